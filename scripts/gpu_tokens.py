"""Token caches for a small transfer: an array is stored as differences or ranks in byte planes, which compress three times better.

    python gpu_tokens.py pack TOKENS_FOLDER FILE     # writes FILE (xz)
    python gpu_tokens.py unpack FILE TOKENS_FOLDER   # byte for byte what was packed; the cache checks its hashes anyway

Needs NumPy alone.
"""

import io
import json
import lzma
import struct
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0}]


def planes(values: np.ndarray) -> bytes:
    """Little-endian unsigned numbers, all first bytes, then all second bytes, ..."""
    return np.ascontiguousarray(values.astype("<u4").view(np.uint8).reshape(-1, 4).T).tobytes()


def from_planes(data: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(4, -1).T).view("<u4").reshape(-1)


def encode(path: Path) -> tuple[dict, bytes]:
    """(how, data) of one file of a token cache."""
    raw = path.read_bytes()
    about = {"name": f"{path.parent.name}/{path.name}", "how": "raw"}
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.dtype == np.uint32 and array.ndim == 1 and len(array):
            head = raw[: len(raw) - array.nbytes]
            about["head"] = head.hex()
            if path.stem == "words":
                values, ranks = np.unique(array, return_inverse=True)
                return {**about, "how": "ranks", "values": len(values)}, planes(np.diff(values, prepend=np.uint32(0))) + planes(ranks)
            if path.stem == "ends":
                return {**about, "how": "differences"}, planes(np.diff(array, prepend=np.uint32(0)))
            return {**about, "how": "planes"}, planes(array)
    return about, raw


def decode(about: dict, data: bytes) -> bytes:
    """The file's bytes."""
    if about["how"] == "raw":
        return data
    if about["how"] == "ranks":
        cut = 4 * about["values"]
        array = np.cumsum(from_planes(data[:cut]), dtype=np.uint32)[from_planes(data[cut:])]
    else:
        array = from_planes(data)
        if about["how"] == "differences":
            array = np.cumsum(array, dtype=np.uint32)
    return bytes.fromhex(about["head"]) + array.astype("<u4").tobytes()


def squeeze(path: Path) -> tuple[dict, bytes]:
    about, data = encode(path)
    assert decode(about, data) == path.read_bytes(), path
    return about, lzma.compress(data, lzma.FORMAT_XZ, filters=FILTERS)


def spread(task: tuple[dict, bytes, str]) -> None:
    about, data, folder = task
    path = Path(folder) / about["name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(decode(about, lzma.decompress(data)))


def main() -> None:
    verb, source, target = sys.argv[1:]
    with ProcessPoolExecutor() as pool:
        if verb == "pack":
            done = list(pool.map(squeeze, sorted(p for p in Path(source).glob("*/*") if p.is_file())))
            heads = json.dumps([{**about, "bytes": len(data)} for about, data in done]).encode()
            out = io.BytesIO()
            out.write(struct.pack("<I", len(heads)) + heads)
            for _, data in done:
                out.write(data)
            Path(target).write_bytes(out.getvalue())
        elif verb == "unpack":
            raw = Path(source).read_bytes()
            (size,) = struct.unpack("<I", raw[:4])
            place, tasks = 4 + size, []
            for about in json.loads(raw[4 : 4 + size]):
                tasks.append((about, raw[place : place + about["bytes"]], target))
                place += about["bytes"]
            list(pool.map(spread, tasks))
        else:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()

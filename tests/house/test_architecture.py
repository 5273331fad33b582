"""Rules of docs/design.md that a reader should not have to check by hand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/gain_cl"
MODULES = sorted(SOURCE.rglob("*.py"))


def rooms() -> dict[str, int]:
    """Return room -> height, the lowest 0, from the table of docs/design.md."""
    listed = re.findall(
        r"^\| (`.+`) \| ", (ROOT / "docs/design.md").read_text(), flags=re.MULTILINE
    )
    return {
        name: height
        for height, row in enumerate(reversed(listed))
        for name in re.findall(r"`(\w+)`", row)
    }


def own(path: Path) -> str:
    """Return the room of a file: its package, or the module itself at the top."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def for_typing(tree: ast.AST) -> set[int]:
    """Ids of the nodes under ``if TYPE_CHECKING``."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {id(child) for block in blocks for child in ast.walk(block)}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports when it runs, not for type checking."""
    hidden = for_typing(tree)
    found: set[str] = set()
    for node in (n for n in ast.walk(tree) if id(n) not in hidden):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_room_is_in_the_table() -> None:
    assert {own(p) for p in MODULES} - {"__init__", "__main__"} == set(rooms())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    table, here = rooms(), own(path)
    if here in ("__init__", "__main__"):  # they name the doors
        return
    used = {
        name.split(".")[1]
        for name in imports(ast.parse(path.read_text()))
        if name.startswith("gain_cl.")
    }
    upward = {
        name for name in used if name in table and name != here and table[name] >= table[here]
    }
    assert not upward, f"{here} imports {upward}"


@pytest.mark.parametrize(
    ("package", "door"),
    [
        ("hydra", {"compose", "cli", "config"}),
        ("transformers", {"models"}),
        ("lm_eval", {"measure"}),
        ("wandb", {"runs"}),
        ("peft", {"adapters"}),
        ("huggingface_hub", {"system", "compose"}),
    ],
)
def test_one_door_for_each_library(package: str, door: set[str]) -> None:
    users = {
        own(p)
        for p in MODULES
        if any(f"{n}.".startswith(f"{package}.") for n in imports(ast.parse(p.read_text())))
    }
    assert users <= door


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_opening_data_never_runs_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            assert not {"pickle", "dill", "marshal", "shelve"} & set(names)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in (
                "eval",
                "exec",
                "torch.load",
                "yaml.load",
                "os.system",
                "__import__",
            ), f"{name} in {path.name}:{node.lineno}"
            for keyword in node.keywords:
                assert not (
                    keyword.arg in ("shell", "trust_remote_code")
                    and ast.unparse(keyword.value) == "True"
                ), f"{path.name}:{node.lineno}"


def opens(call: ast.Call) -> bool:
    """Whether a call opens a model, config or tokenizer of transformers. PEFT's open none."""
    owner, _, name = ast.unparse(call.func).rpartition(".")
    return name in ("from_pretrained", "from_config") and not owner.startswith("peft.")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_model_brings_code(path: Path) -> None:
    """Find trust_remote_code=False, spelt out, in every call that opens something of a model."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and opens(node):
            said = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}"


def test_the_calls_that_open_a_model_are_seen() -> None:
    nodes = [
        n for p in (SOURCE / "models").glob("*.py") for n in ast.walk(ast.parse(p.read_text()))
    ]
    assert sum(isinstance(n, ast.Call) and opens(n) for n in nodes) >= 6


def foreign_privates(tree: ast.AST) -> list[str]:
    """Return the private names of libraries that a file uses: what it imports of them, and
    attributes that neither it nor a module of gain_cl that it imports defines."""
    nodes = list(ast.walk(tree))
    sources = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    ours = [n for n in sources if (n.module or "").startswith("gain_cl")]
    owners = {a.asname or a.name for n in ours for a in n.names} | {"self", "cls"}
    made = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    made |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    made |= {"_asdict", "_replace", "_fields"}
    imported = [
        ast.unparse(n)
        for n in sources
        if n not in ours and re.search(r"(^|[ .])_[a-z]", ast.unparse(n))
    ]
    used = [
        ast.unparse(n)
        for n in nodes
        if isinstance(n, ast.Attribute)
        and re.match(r"_[^_]", n.attr)
        and ast.unparse(n.value) not in owners
        and n.attr not in made
        and ast.unparse(n) not in ("os._exit", "sys._current_frames")  # documented names
    ]
    return imported + used


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_private_name_of_a_library(path: Path) -> None:
    assert not foreign_privates(ast.parse(path.read_text()))


def test_a_private_name_of_a_library_is_found() -> None:
    text = "from peft.tuners._x import a\nfrom gain_cl.models import load\nmodel._tie_weights()\n"
    text += "load._x()\nself.model._hf_hook\nself._own\n"
    found = foreign_privates(ast.parse(text))
    expected = ["from peft.tuners._x import a", "model._tie_weights", "self.model._hf_hook"]
    assert sorted(found) == expected


FREE = ("config", "stats", "system", "compose", "paper", "studies", "errors", "cli")
"""Rooms whose modules import no torch."""
SOME = (
    "measure.record",
    "measure.tasks",
    "models.source",
    "models.load",
    "domains",
    "runs.run",
    "runs.track",
)


def test_heavy_imports_wait() -> None:
    """Import the torch-free modules: torch, transformers and the like stay out."""
    free = [
        ".".join(p.relative_to(SOURCE).with_suffix("").parts) for p in MODULES if own(p) in FREE
    ]
    free = [name.removesuffix(".__init__") for name in free] + list(SOME)
    heavy = {"torch", "transformers", "lm_eval", "wandb", "peft"}
    code = (
        f"import importlib, sys\nfor m in {free!r}: importlib.import_module('gain_cl.' + "
        f"m)\nassert not {heavy!r} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_path_of_a_machine_and_no_index_in_tracked_files() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    parts = ["/" + "work/", "/" + "home/", "/" + "root/", "://" + "pypi."]
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".cff", ""}
            and path.is_file()
        ):
            text = path.read_text(errors="ignore")
            assert not [p for p in parts if p in text], name

"""The parser that verbs share."""

from __future__ import annotations

import pytest

from gain_cl.errors import ConfigError
from gain_cl.tools.command import CONFIGURATION, RUN, Parser


def test_key_value_is_an_option_in_any_order() -> None:
    for argv in (["results_dir=a=b", "x", "--json"], ["x", "--json", "--results-dir", "a=b"]):
        args = Parser("verify", *RUN).read(argv)
        assert (args.run, args.results_dir, args.output_dir, args.json) == ("x", "a=b", None, True)


def test_overrides_of_a_run_stay_words() -> None:
    words = ["seed=3", "plugin=x", "output_dir=y"]
    args = Parser("prepare", *CONFIGURATION, "--json").read([*words[:1], "--json", *words[1:]])
    assert args.overrides == words and args.json and args.plugin == []


@pytest.mark.parametrize("word", ["outputdir=x", "--outputdir=x", "--output-di"])
def test_what_is_no_option_is_told(word: str) -> None:
    with pytest.raises(ConfigError, match=r"outp.*\(gain_cl verify\); did you mean output-dir\?"):
        Parser("verify", *RUN).read(["x", word])

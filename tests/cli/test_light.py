"""Commands that only read prompts load no networks, which would take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from training import flow

PROGRAM = """
import atexit, json, sys
heavy = ("torch", "diffusers", "ray")
atexit.register(lambda: print(json.dumps([name for name in heavy if name in sys.modules])))
from aae_batch.cli.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def two_streams(tmp_path_factory):
    """A model whose network attends to CLIP's tokens and to T5's."""
    folder = tmp_path_factory.mktemp("flow")
    flow.pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokens", "a red circle", "--model", "MODEL"],
        ["manifest", "validate", "MANIFEST", "--model", "MODEL"],
        ["generate", "MANIFEST", "OUTPUT", "--model", "MODEL", "--dry-run"],
    ],
    ids=lambda arguments: arguments[-1] if "--dry-run" in arguments else arguments[0],
)
def test_prompts_are_checked_without_networks(arguments, two_streams, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"prompt": "a red circle", "subjects": ["red circle"]}\n')
    places = {"MODEL": two_streams, "MANIFEST": manifest, "OUTPUT": tmp_path / "output"}
    command = [str(places.get(argument, argument)) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True, check=True
    )
    *said, loaded = done.stdout.splitlines()
    assert json.loads(loaded) == []
    if arguments[0] != "manifest":
        assert "T5" in "\n".join(said)


def test_a_prompt_that_one_encoder_cuts_off_is_told_by_its_name(two_streams, tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(
        '{"prompt": "a red circle and a blue square", "subjects": ["red circle"]}\n'
    )
    command = ["manifest", "validate", manifest, "--model", two_streams]
    command += ["--max-sequence-length", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "aae_batch.cli", *map(str, command)], capture_output=True, text=True
    )
    assert "has 7 tokens and the text encoder T5 sees 3" in done.stdout + done.stderr
    assert "CLIP" not in done.stdout


def test_tokens_that_tell_no_subject_are_shown_as_such(two_streams):
    command = ["tokens", "frog \u732b", "--model", two_streams]
    done = subprocess.run(
        [sys.executable, "-m", "aae_batch.cli", *map(str, command)], capture_output=True, text=True
    )
    lines = [line.split(maxsplit=2) for line in done.stdout.partition("T5:")[2].splitlines()]
    assert [line[2].strip() for line in lines[2:9]] == [
        "no: the space before a word",
        *["yes"] * 4,
        "no: the space before a word",
        "no: the model does not know these letters",
    ]

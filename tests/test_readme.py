"""The README's first Python block runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_draws_its_pictures(tmp_path, monkeypatch, capsys):
    example = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{i}.png" for i in range(4)]
    assert len(capsys.readouterr().out.splitlines()) == 4

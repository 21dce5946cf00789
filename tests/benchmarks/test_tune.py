"""The tuning benchmark runs a grid on the same prompts and prints a row for each cell."""

from __future__ import annotations

import pytest
from PIL import Image

from aae_batch.errors import SettingsError
from benchmarks import tune


def test_it_prints_a_row_for_each_cell_and_keeps_its_images(tmp_path, capsys):
    grid = ["--scale-factors", "5", "--layers", "default; 0-1", "--images", str(tmp_path)]
    tune.main(["shapes", "--prompts", "1", "--steps", "2", "--device", "cpu", *grid])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [layers, factor] for factor in ("none", "5") for layers in ("default", "0-1")
    ]
    assert all(0 < float(row[3]) <= 1 and row[-1] == "0" for row in rows)
    images = [Image.open(path) for path in tmp_path.glob("*/0.png")]
    assert [image.size for image in images] == [(128, 128)] * 4


def test_layers_that_the_model_lacks_end_it_before_the_first_image():
    with pytest.raises(SettingsError, match="attn_layers has 99"):
        tune.main(["shapes", "--device", "cpu", "--layers", "default;0,99"])


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("default", {}),
        ("8-15", {"attn_layers": "8-15"}),
        ("@32x32", {"attn_res": "32x32"}),
        ("0-19@32x32", {"attn_layers": "0-19", "attn_res": "32x32"}),
    ],
)
def test_layers_and_resolutions_are_read(text, settings):
    assert tune.where(text) == settings

"""`python -m data_prep.head_asset`: asset, pictures and errors."""

import numpy as np
import pytest
from PIL import Image

from data_prep import head_asset
from data_prep.landmarks.head_sheet import sheet_pictures
from loki_jax.face.asset import load_head
from tests.face.golden_flame import LIP_VERTEX, flame_dict, read, write_pickle
from tests.face.test_ict import arrays


def test_ict_with_a_sheet(tmp_path, capsys):
    np.savez(tmp_path / "ict.npz", **arrays())
    out = tmp_path / "sub" / "head.npz"
    assert head_asset.main(["ict", str(tmp_path / "ict.npz"), "--no-embedding", "--out", str(out)]) == 0
    head = load_head(out)
    assert head.name == "ict" and "sha256" in capsys.readouterr().out
    pictures = sheet_pictures(head)
    captions = [picture.caption for picture in pictures]
    assert "jawOpen" in captions and "turned +40" in captions and "neck y 25" in captions
    sheet = np.asarray(Image.open(out.with_suffix(".png")))
    cells = len(pictures) + len(head.landmarks)
    rows = -(-cells // 10)
    assert sheet.shape == (rows * 174, 1600, 3)
    cell = lambda i: sheet[
        i // 10 * 174 + 14 : i // 10 * 174 + 174, i % 10 * 160 : i % 10 * 160 + 160
    ].astype(int)
    rest = captions.index("turned +0")
    assert 0.2 < (cell(rest) != 255).any(-1).mean() < 0.95  # a head on white
    for caption in ("turned +40", "neck y 25", "jawOpen"):
        assert np.abs(cell(captions.index(caption)) - cell(rest)).max() > 30, caption


def test_flame_without_a_sheet(golden, tmp_path):
    model = write_pickle(tmp_path / "flame.pkl", flame_dict(read(golden, "flame_model")))
    out = tmp_path / "head.npz"
    options = ["--out", str(out), "--lip-vertex", str(LIP_VERTEX), "--n-expression", "10", "--no-sheet"]
    assert head_asset.main(["flame", str(model), *options]) == 0
    assert load_head(out).n_expression == 10 and not out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [("m.pkl", b"cos\nsystem\n(S'true'\ntR.", "unsafe pickle"), ("e.pkl", b"", "not a readable pickle")],
)
def test_errors_leave_nothing_behind(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "head.npz"
    assert head_asset.main(["flame", str(tmp_path / name), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and message in error
    assert [p.name for p in tmp_path.iterdir()] == [name]

"""The fingerprint: closed-form figures, and files that are no datastats.yaml."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from analysis_data import DataSet, make_label

from autoseg.data.fingerprint import Fingerprint, LabelGroup
from autoseg.errors import WorkspaceError


def test_closed_form(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, num=0)
    spacings = [(1.0, 1.0, 2.0), (1.0, 1.0, 4.0), (2.0, 1.0, 5.0)]
    shapes = [(10, 10, 10), (12, 10, 20), (14, 10, 30)]
    for number, (spacing, shape) in enumerate(zip(spacings, shapes, strict=True)):
        image = np.zeros(shape, np.int16)
        image[1:9, 1:9, 1:9] = 10
        image[1, 2:5, 2:5] = 100 * (number + 1)  # a third of class 1
        label = make_label((1, 2) if number else (1,), shape)
        data.add(image=image, label=label, affine=np.diag([*spacing, 1.0]), fold=number % 2)
    analysis = data.analyze(strict=True, partial_labels="infer")
    found = Fingerprint.read(data.workspace.datastats)
    assert found == analysis.fingerprint
    assert (found.num_cases, found.num_channels) == (3, 1)
    assert found.spacing_mm_min == (1.0, 1.0, 2.0)
    assert found.spacing_mm_p10 == pytest.approx((1.0, 1.0, 2.4))
    assert found.spacing_mm_median == (1.0, 1.0, 4.0)
    assert found.spacing_mm_max == (2.0, 1.0, 5.0)
    assert (found.shape_min, found.shape_median, found.shape_max) == tuple(shapes)
    assert found.shape_p90 == (14, 10, 28)
    assert found.size_mm_median == (12.0, 10.0, 80.0)
    assert found.size_mm_p90 == pytest.approx((24.8, 10.0, 136.0))
    assert found.nonzero_crop_ratio == pytest.approx(512 / 2400)
    assert found.class_names == ("liver", "tumor")
    assert found.class_num_cases == (3, 2)
    total = 1000 + 2400 + 4200
    assert found.class_voxel_fraction == pytest.approx((81 / total, 54 / total))
    foreground = np.repeat([10, 100, 200, 300], [18 + 45 + 45, 9, 9, 9])
    assert (found.foreground[0].min, found.foreground[0].max) == (10, 300)
    assert found.foreground[0].mean == pytest.approx(foreground.mean())
    assert found.foreground[0].std == pytest.approx(foreground.std())
    assert found.foreground[0].median == 10
    assert found.foreground[0].p99_5 == np.percentile(foreground, 99.5)
    assert found.label_groups == (
        LabelGroup(classes=("liver", "tumor"), cases=("case_1", "case_2")),
        LabelGroup(classes=("liver",), cases=("case_0",)),
    )


def test_axes_are_ras_however_a_file_is_stored(tmp_path: Path) -> None:
    data = DataSet(root=tmp_path, num=0)
    affine = np.array([[0, 0, 3.0, 0], [-1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    for fold in range(2):
        data.add(affine=affine, fold=fold)
    data.analyze(strict=True)
    found = Fingerprint.read(data.workspace.datastats)
    assert found.shape_median == (10, 14, 12)
    assert found.spacing_mm_median == pytest.approx((3.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing. Run `autoseg analyze` first."),
        ("a: [", "cut off or damaged: not valid YAML .*Undo the edit, or delete the file and run `autoseg analyze`"),
        ("stats_summary: {n_cases: 3}", "data_set is missing; label_groups is missing; .*; and 2 more."),
        ("[]", "found .., expected an object of names and values. Undo the edit, or delete"),
    ],
)
def test_other_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "datastats.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(WorkspaceError, match=message):
        Fingerprint.read(path)

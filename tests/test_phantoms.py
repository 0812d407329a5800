"""Phantoms: closed forms, determinism, and that they are what they say."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest

from autoseg.data.datalists.datalist import read_datalist
from autoseg.data.formats.table import read_grid
from autoseg.data.phantoms import ellipsoid, ellipsoid_volume, make_phantoms
from autoseg.data.volumes import read_image, read_label
from autoseg.errors import ConfigError


def test_ellipsoid_has_its_volume_and_place() -> None:
    radii, centre = (14.0, 10.0, 7.5), (19.5, 16.0, 12.25)
    mask = ellipsoid((40, 32, 26), centre, radii)
    assert mask.sum() == pytest.approx(ellipsoid_volume(radii), rel=0.01)
    np.testing.assert_allclose([i.mean() for i in np.nonzero(mask)], centre, atol=0.05)
    assert ellipsoid((9, 9, 9), (4, 4, 4), (1, 1, 1)).sum() == 7


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(name: str, seed: int) -> dict[str, str]:
        make_phantoms(tmp_path / name, num_cases=3, num_testing=1, shape=(24, 24, 24), seed=seed)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / name)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first = digests("a", 0)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 100)  # gzip notes when it packed
    assert digests("b", 0) == first
    other = digests("c", 1)
    assert all(other[name] != first[name] for name in first if name.endswith(".nii.gz"))
    assert {n for n in first if "/" not in n} == {"datalist.json", "input.yaml"}


def test_cases_have_all_classes_and_odd_grids(phantom_dataset: Path) -> None:
    data = read_datalist(phantom_dataset / "datalist.json", phantom_dataset)
    assert (len(data.training), len(data.testing), data.num_fold) == (6, 2, 3)
    assert data.labels == {1: "sphere", 2: "box"}
    grids = [read_grid(c.images[0])[0] for c in data.training]
    assert [g.orientation for g in grids[:4]] == ["RAS", "LPS", "RAS", "PIR"]
    tilt = grids[2].affine[:3, :3] / grids[2].spacing_mm
    assert np.degrees(np.arccos(np.abs(np.diag(tilt)).min())) > 5
    assert len({g.spacing_mm for g in grids}) == 6
    for case in (*data.training, *data.testing):
        image, label = read_image(case.images), read_label(case.label)
        assert image.grid.differs_from(label.grid) is None
        assert set(np.unique(label.array)) == {0, 1, 2}
        voxel_mm3 = np.prod(image.spacing_mm)
        for value in (1, 2):
            # Structures scale with the smallest half extent, which is about 14 mm here and 20 mm by default.
            assert 150 < (label.array == value).sum() * voxel_mm3 < 2500
        body, sphere, box = (np.median(image.array[label.array == v]) for v in (0, 1, 2))
        assert body < sphere < box


def test_channels_and_partial_labels(tmp_path: Path) -> None:
    make_phantoms(
        tmp_path,
        num_cases=4,
        num_testing=1,
        num_unlabeled=2,
        shape=(24, 24, 24),
        num_channels=2,
        num_fold=2,
        classes=("sphere", "box", "cylinder"),
        annotated=[["sphere", "box", "cylinder"], ["box"]],
    )
    data = read_datalist(tmp_path / "datalist.json", tmp_path)
    assert [c.annotated for c in data.training[:2]] == [("sphere", "box", "cylinder"), ("box",)]
    assert {tuple(sorted(str(c.fold) for c in data.training if c.annotated == ("box",)))} == {("0", "1")}
    assert [len(c.images) for c in data.unlabeled] == [2, 2]
    assert set(np.unique(read_label(data.training[0].label).array)) == {0, 1, 2, 3}
    assert set(np.unique(read_label(data.training[1].label).array)) == {0, 2}
    assert "partial_labels: declared" in (tmp_path / "input.yaml").read_text()


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_phantoms(tmp_path, classes=("sphere", "cube"))
    assert str(caught.value) == (
        "phantoms: classes sphere, cube of shape (40, 36, 32). "
        "Expected classes out of sphere, box, cylinder and at least 24 voxels along each axis."
    )
    assert list(tmp_path.iterdir()) == []

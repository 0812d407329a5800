"""The settings and the strict reader: values as written, every fault at once, with its place and remedy."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autoseg.config.docs import setting_docs
from autoseg.config.load import AUTO3DSEG_WITHOUT_EFFECT, load_settings
from autoseg.config.reader import read_model, read_value
from autoseg.config.settings import ClassSpec, EnsembleSettings, Settings
from autoseg.config.units import parse_duration, parse_size
from autoseg.errors import ConfigError

HEAD = "modality: CT\ndatalist: d.json\ndataroot: .\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write input.yaml in the test's folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.json").write_text("{}")

    def write_input(text: str) -> Path:
        path = Path("input.yaml")
        path.write_text(text)
        return path

    return write_input


def faults(path: Path, overrides: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, overrides)
    return list(caught.value.messages)


def test_values_origins_and_precedence(write: Write) -> None:
    path = write(HEAD + "num_epochs: 7\nlearning_rate: 1e-4\nsegresnet:\n  batch_size: 3\n  num_epochs: 9\n")
    settings, origins = load_settings(path, {"num_epochs": "5", "segresnet.init_filters": "8", "algos": "dints"})
    assert settings.num_epochs == 5
    assert settings.learning_rate == 1e-4
    assert settings.algos == ("dints",)
    assert settings.hyper("segresnet") == {"learning_rate": 1e-4, "num_epochs": 9, "batch_size": 3, "init_filters": 8}
    assert settings.hyper("dints") == {"learning_rate": 1e-4, "num_epochs": 5}
    assert origins["num_epochs"] == origins["algos"] == origins["segresnet.init_filters"] == "command line"
    assert origins["learning_rate"] == "input.yaml:5"
    assert origins["segresnet"] == "input.yaml:6"
    assert origins["segresnet.num_epochs"] == "input.yaml:8"
    assert origins["seed"] == "default"
    assert "dints.num_epochs" not in origins


@pytest.mark.parametrize(
    "text", ["2024_01", "no", "1e3", "010", "12:30", "2024-01-01", "1.10", "0x1F", "off", "=", "1_0"]
)
def test_text_keeps_its_source(write: Write, text: str) -> None:
    settings, _ = load_settings(write(f"{HEAD}name: {text}\n"))
    assert settings.name == text
    settings, _ = load_settings(write(HEAD), {"name": text})
    assert settings.name == text


@pytest.mark.parametrize("text", ["a: b", "[x", "#1", "{", "a,b", "- a", "'"])
def test_text_from_the_command_line_is_not_yaml(write: Write, text: str) -> None:
    assert load_settings(write(HEAD), {"name": text})[0].name == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_epohs: 3", "num_epohs: unknown key. Did you mean num_epochs?"),
        ("init_filters: 3", "init_filters: unknown key. It belongs under segresnet: write segresnet.init_filters."),
        ("segresnet: {num_fold: 3}", "segresnet.num_fold: unknown key. It belongs at the top level, not in a block."),
        (
            "ensemble: {qqq: 3}",
            "ensemble.qqq: unknown key. "
            "Known: combine, max_memory, max_time, method, num_best, postprocess, robustness, select_by.",
        ),
        ("modality: MRI", "modality: already given on line 1. Keep one of the two."),
        ("num_epochs: 1e3", "num_epochs: expected a whole number >= 1, found 1e3. Write 1000."),
        ("num_epochs: 1.5", "num_epochs: expected a whole number >= 1, found 1.5."),
        ("num_epochs: 0", "num_epochs: expected a whole number >= 1, found 0."),
        ("num_epochs: '5'", 'num_epochs: expected a whole number >= 1, found the text "5". Remove the quotes.'),
        (
            "num_epochs: 2024_01",
            "num_epochs: expected a whole number >= 1, found 2024_01. Write 202401, without underscores.",
        ),
        (
            "num_epochs: 010",
            "num_epochs: expected a whole number >= 1, found 010. Write 10: a leading zero means octal to YAML.",
        ),
        (
            "num_epochs: 12:30",
            "num_epochs: expected a whole number >= 1, found 12:30. "
            "YAML counts the parts of such a value in sixties; write one number.",
        ),
        ("learning_rate: .inf", "learning_rate: expected a number > 0, found .inf."),
        ("learning_rate: 0,1", "learning_rate: expected a number > 0, found 0,1. Write 0.1, with a point."),
        ("learning_rate: 1e999", "learning_rate: expected a number > 0, found 1e999."),
        ("tta: maybe", "tta: expected true or false, found maybe."),
        ("tta: 1", "tta: expected true or false, found 1."),
        ("precision: no", "precision: expected one of auto, bf16, fp16, fp32, found no."),
        ("loss: dicece", "loss: expected one of dice_ce, dice_focal, found dicece. Did you mean dice_ce?"),
        (
            "ignore_label: None",
            "ignore_label: expected a whole number >= 1 and <= 65534, found None. Write null to leave it unset.",
        ),
        ("roi_size: [96, 0, 96]", "roi_size[1]: expected a whole number >= 1, found 0."),
        ("roi_size: [96, 96]", "roi_size: expected 3 whole numbers >= 1, found [96, 96]."),
        ("resample_resolution: 1.0", "resample_resolution: expected 3 numbers > 0, found 1.0."),
        ("algos: []", "algos: the list is empty. Give at least one value, or leave the key out."),
        ("algos: [dints, dints]", "algos: dints is given more than once. Give each value once."),
        (
            "intensity_bounds: [3, 1]",
            "intensity_bounds: expected the lower bound first, then a higher one, found [3.0, 1.0].",
        ),
        ("budget: 90", "budget: expected a time with its unit, such as 90s, 10m, 2h, 1h30m or 1d, found 90."),
        (
            "class_names: [{name: a, index: 70000}]",
            "class_names[0].index: expected a whole number >= 0 and <= 65535, found 70000.",
        ),
        (
            "class_names: [{name: a}]",
            "class_names[0].index: missing. "
            "Expected a list of whole numbers >= 0 and <= 65535: Label values that belong to it.",
        ),
        ("class_names: [[a]]", "class_names[0]: expected text or {name, index}, found [a]."),
        (
            "ensemble: sometimes",
            "ensemble: expected a block of settings or true or false, found sometimes.",
        ),
        ("extra_modalities: ct", "extra_modalities: expected a mapping of names to texts, found ct."),
        (
            "swinunetr: {feature_size: 13}",
            "swinunetr.feature_size: expected a whole number >= 12 and <= 2048 and divisible by 12, found 13.",
        ),
        ("name:", "name: expected text, found nothing."),
        ("? [a]\n: 3", "expected a name before the colon, found [a]."),
        (
            "name: !!python/name:os.system x",
            "name: the tag tag:yaml.org,2002:python/name:os.system is not read. Remove it.",
        ),
        (
            "a: b: c",
            "not valid YAML: mapping values are not allowed in this context. "
            "Check colons, quotes, brackets and indentation.",
        ),
    ],
)
def test_one_fault(write: Write, line: str, message: str) -> None:
    assert faults(write(f"{HEAD}{line}\n")) == [f"input.yaml:4: {message}"]


def test_all_faults_at_once_in_order(write: Write) -> None:
    path = write("modality: CT\ndatalist: d.json\nseed: -1\nnum_epohs: 1\nsegresnet:\n  batch_size: x\n")
    assert faults(path, {"num_epohs": "3", "dints.channel_mul": "0", "roi_size": "[1,2"}) == [
        "input.yaml: dataroot: missing. Expected a path: Folder the paths in the datalist are relative to; "
        "relative to the folder of input.yaml.",
        "input.yaml:3: seed: expected a whole number >= 0, found -1.",
        "input.yaml:6: segresnet.batch_size: expected a whole number >= 1, found x.",
        "--roi_size: not valid YAML: did not find expected ',' or ']'. Check colons, quotes, brackets and indentation.",
        "--num_epohs: unknown key. Did you mean --num_epochs?",
        "--dints.channel_mul: expected a number > 0 and <= 64, found 0.",
    ]


def test_class_names_and_unions(write: Write) -> None:
    text = "class_names:\n- liver\n- {name: no, index: [1, 2]}\n- {name: 7, index: 3}\nensemble: {method: best_n}\n"
    settings, _ = load_settings(write(HEAD + text))
    assert settings.class_names == (
        "liver",
        ClassSpec(name="no", index=(1, 2)),
        ClassSpec(name="7", index=(3,)),
    )
    assert settings.ensemble == EnsembleSettings(method="best_n")
    assert load_settings(write(HEAD + "ensemble: no\n"))[0].ensemble is False
    assert load_settings(write(HEAD + "ensemble: no\n"), {"ensemble.num_best": "3"})[0].ensemble == EnsembleSettings(
        num_best=3
    )


@pytest.mark.parametrize("text", ["segresnet,dints", "[segresnet, dints]", "[segresnet,dints]"])
def test_lists_on_the_command_line(write: Write, text: str) -> None:
    assert load_settings(write(HEAD), {"algos": text})[0].algos == ("segresnet", "dints")
    assert load_settings(write(HEAD), {"roi_size": "96,96,64"})[0].roi_size == (96, 96, 64)
    assert load_settings(write(HEAD + "folds: [1]\n"), {"folds": "null"})[0].folds is None


def test_auto3dseg_keys_warn(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write(HEAD + "".join(f"{key}: 1\n" for key in AUTO3DSEG_WITHOUT_EFFECT))
    with caplog.at_level(logging.WARNING):
        load_settings(path)
    assert len(caplog.messages) == len(AUTO3DSEG_WITHOUT_EFFECT)
    assert "input.yaml:14: multigpu: has no effect: all GPUs are used." in caplog.messages
    assert not set(AUTO3DSEG_WITHOUT_EFFECT) & set(Settings.model_fields)


def test_paths(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("modality: CT\ndatalist: d.json\ndataroot: .\nwork_dir: x/../y\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings, _ = load_settings(Path("../input.yaml"), {"dataroot": "."})
    assert settings.datalist == tmp_path / "d.json"
    assert settings.work_dir == tmp_path / "y"
    assert settings.dataroot == tmp_path / "elsewhere"


def test_paths_that_are_not_there(write: Write, tmp_path: Path) -> None:
    path = write("modality: CT\ndatalist: e.json\ndataroot: d.json\nwork_dir: d.json\n")
    file = tmp_path / "d.json"
    assert faults(path) == [
        f"input.yaml:2: datalist: no such file: {tmp_path / 'e.json'}. e.json is relative to the folder of input.yaml.",
        f"input.yaml:3: dataroot: expected a folder, found a file: {file}. "
        "d.json is relative to the folder of input.yaml.",
        f"input.yaml:4: work_dir: expected a folder, found a file: {file}. Give another work_dir.",
    ]
    assert faults(write(HEAD), {"dataroot": "no_such"}) == [
        f"--dataroot: no such folder: {tmp_path / 'no_such'}. no_such is relative to the current folder."
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "input.yaml:1: expected lines of `key: value`, found [a]."),
        (
            b"a: 1\n\tb: 2\n",
            "input.yaml:2: not valid YAML: found a tab character that violates indentation. "
            "Check colons, quotes, brackets and indentation.",
        ),
        (b"name: \xff\n", "input.yaml: byte 6 is not UTF-8. Save it as plain text in UTF-8."),
        (b"[" * 200_000, "input.yaml:1: nested deeper than 30 levels. Flatten it."),
    ],
)
def test_files_that_cannot_be_read(write: Write, content: bytes, message: str) -> None:
    path = write("")
    path.write_bytes(content)
    assert faults(path) == [message]


def test_no_input(write: Write) -> None:
    assert faults(Path("nowhere.yaml")) == [
        "nowhere.yaml: no such file. Write one with `autoseg init DATA_FOLDER`, or name it with --input FILE."
    ]
    assert [line.split(":")[1].strip() for line in faults(write(""))] == ["modality", "datalist", "dataroot"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "10 parsecs", "-1h", "0s", "1h 30", "1h,30m", "h1"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a time with its unit"):
        parse_duration(text)


def test_every_default_survives_writing_and_reading(write: Write) -> None:
    settings = Settings(modality="CT", datalist=Path("d.json"), dataroot=Path("."))
    path = write(yaml.safe_dump(settings.model_dump(mode="json")))
    assert read_model(path, Settings) == settings


def test_every_setting_is_documented() -> None:
    assert [key for key, doc in setting_docs().items() if not doc.doc or "anything" in doc.type] == []


@hypothesis_settings(max_examples=50)
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_any_text_gives_settings_or_messages(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "input.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ConfigError):
        load_settings(path)


@hypothesis_settings(max_examples=50)
@given(st.sampled_from(sorted(setting_docs())), st.text(max_size=20))
def test_any_value_gives_a_setting_or_a_message_that_names_it(key: str, text: str) -> None:
    messages: tuple[str, ...] = ()
    try:
        read_value(key, text, setting_docs()[key].annotation)
    except ConfigError as error:
        messages = error.messages
    assert all(message.startswith(f"--{key}") for message in messages)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("500MB", 500_000_000), ("4 GB", 4 * 10**9), ("3.5GiB", int(3.5 * 2**30)), ("1tb", 10**12)]
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "4", "4 G", "-4GB", "0GB", "GB", "1e3MB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="expected an amount of memory with its unit, such as 500MB"):
        parse_size(text)

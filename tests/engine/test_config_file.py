"""Config files: bases, limits, and no code in them runs."""

import pytest

from eco_m2f.engine.config_file import read_config


def write(folder, **files: str) -> str:
    """Writes files by their stem. Returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{next(iter(files))}.yaml")


def test_bases_lie_below_in_their_order(tmp_path):
    (tmp_path / "sub").mkdir()
    path = write(tmp_path, a='_BASE_: ["b.yaml", "sub/c.yaml"]\nX: {P: 1}\n', b="X: {P: 2, Q: 2, R: 2}\nY: b\n")
    write(tmp_path / "sub", c="_BASE_: d.yaml\nX: {Q: 3}\nZ: [1, 2]\n", d="X: {R: 4}\nY: d\n")
    assert read_config(path) == {"X": {"P": 1, "Q": 3, "R": 4}, "Y": "d", "Z": [1, 2]}


def test_a_base_may_be_named_twice_and_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, a='_BASE_: ["~/b.yaml", "c.yaml"]', b="_BASE_: d.yaml", c="_BASE_: d.yaml", d="X: 1")
    assert read_config(path) == {"X": 1}


def test_tuples_and_anchors_are_data(tmp_path):
    path = write(tmp_path, a="A: !!python/tuple [1, 2]\nB: &b {X: 1}\nC: *b\nD: {<<: *b, Y: 2}\nE: (1, 2)\n")
    expected = {"A": (1, 2), "B": {"X": 1}, "C": {"X": 1}, "D": {"X": 1, "Y": 2}, "E": "(1, 2)"}
    assert read_config(path) == expected


RUNS_CODE = {
    "apply": "A: !!python/object/apply:os.system ['touch {}']",
    "new": "A: !!python/object/new:os.system ['touch {}']",
    "eval": "A: !!python/object/apply:eval [\"open({!r}, 'w')\"]",
    "name": "A: !!python/name:os.system",
    "module": "A: !!python/module:os",
}


@pytest.mark.parametrize("name", RUNS_CODE)
@pytest.mark.parametrize("base", [False, True])
def test_tags_that_run_code_are_refused(tmp_path, name, base):
    trace = tmp_path / "ran"
    evil = RUNS_CODE[name].replace("{}", str(trace)).replace("{!r}", repr(str(trace)))
    path = write(tmp_path, **({"a": "_BASE_: evil.yaml"} if base else {}), evil=evil)
    with pytest.raises(ValueError, match=r"config file .*evil\.yaml.* cannot be used: line 1.*constructor.*python/"):
        read_config(path)
    assert not trace.exists()


LAUGHS = "A0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "A0: &a0 {x: 1}\n" + "".join(f"A{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
WRONG = {
    "empty": ("", "holds nothing"),
    "comment": ("# only\n", "holds nothing"),
    "scalar": ("3", "holds a int"),
    "list": ("- 1\n- 2\n", "holds a list"),
    "mapping without keys": ("{}", "an empty mapping"),
    "two documents": ("A: 1\n---\nB: 2\n", "line 2"),
    "no YAML": ("MODEL: [", "flow"),
    "a key twice": ("A: 1\nB: 2\nA: 3\n", "line 3: the key 'A' is already in line 1"),
    "a key twice within": ("X:\n  A: 1\n  A: 3\n", "line 3: the key 'A'"),
    "a number as key": ("X: {1: 2}", "X.1 is not a word but a int"),
    "a list as key": ("? [1]\n: 2\n", "a key is not a word"),
    "nan": ("SOLVER: {BASE_LR: .nan}", "SOLVER.BASE_LR is nan"),
    "inf in a list": ("X: {Y: [1, -.inf]}", "X.Y is -inf"),
    "a date": ("X: 2020-01-01", "X is a date"),
    "bytes": ("X: !!binary aGk=", "X is a bytes"),
    "laughs": (LAUGHS, "anchors make it too large"),
    "laughs by merging": (MERGES, "anchors make it too large"),
    "an anchor in itself": ("A: &a [*a]", "nested too deeply"),
    "deep": ("A: " + "[" * 30 + "]" * 30, "nested too deeply"),
    "very deep": ("A: " + "[" * 1500, "cannot be used"),
    "a long text": ("A: " + "x" * 20000, "text of 20000 characters"),
    "large": ("A: [" + "1," * 600_000 + "]", "more than 1048576 bytes"),
    "many digits": ("A: " + "1" * 9000, "cannot be used"),
    "an unknown alias": ("A: *nope", "undefined alias"),
    "base in a folder": ("_BASE_: .", "is a folder"),
    "base that is missing": ("_BASE_: none.yaml", "none.yaml does not exist"),
    "base far away": ("_BASE_: https://example.invalid/x.yaml", "local file"),
    "base of a number": ("_BASE_: 3", "local file"),
    "base of nothing": ("_BASE_:", "local file"),
    "base of a device": ("_BASE_: /dev/zero", "a folder or a device"),
    "base of an unknown user": ("_BASE_: ~no-such-user/x.yaml", "a folder of an unknown user"),
    "its own base": ("_BASE_: a.yaml", "is its own _BASE_: a.yaml -> a.yaml"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_config_is_refused_with_the_reason(tmp_path, name):
    text, reason = WRONG[name]
    path = write(tmp_path, a=text)
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert path in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc", b"A: \x00", b"\x89PNG\r\n\x1a\n"])
def test_a_binary_file_is_refused(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.yaml cannot be used: it is not text"):
        read_config(path)


def test_a_longer_circle_of_bases_is_told(tmp_path):
    path = write(tmp_path, a="_BASE_: b.yaml", b="_BASE_: c.yaml", c="_BASE_: b.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml -> b\.yaml -> c\.yaml -> b\.yaml"):
        read_config(path)


def test_bases_that_double_are_bounded(tmp_path):
    files = {f"f{i}": f"_BASE_: [f{i + 1}.yaml, f{i + 1}.yaml]" for i in range(30)}
    with pytest.raises(ValueError, match="f0.yaml has more than 50 files"):
        read_config(write(tmp_path, **files, f30="X: 1"))


def test_a_group_over_a_value_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.yaml: X\.Y is a group of keys in one file and a value in another"):
        read_config(write(tmp_path, a="_BASE_: b.yaml\nX: {Y: {Z: 1}}", b="X: {Y: 1}"))


def test_a_message_shows_nothing_of_another_file(tmp_path):
    """`_BASE_` may name any file, so the message must not quote it."""
    path = write(tmp_path, a="_BASE_: b.yaml", b="secret: [word\nother: } ]")
    with pytest.raises(ValueError, match=r"b\.yaml \(the _BASE_ of .*a\.yaml\) cannot be used: line") as error:
        read_config(path)
    assert "secret" not in str(error.value) and "word" not in str(error.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"does not exist: see the folder configs/"):
            read_config(path)

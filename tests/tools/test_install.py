"""Installation from nothing: installed packages, kept packages, and an interrupted run."""

import hashlib
import importlib.util
import re
import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def env(tmp_path, monkeypatch):
    """setup_env on an empty folder. Its commands are recorded instead of run."""
    module = load_tool("setup_env")
    venv = tmp_path / ".venv"
    for name, value in {"VENV": venv, "PYTHON": venv / "bin/python", "UNFINISHED": venv / ".unfinished"}.items():
        monkeypatch.setattr(module, name, value)
    module.commands = []

    def record(*command):
        words = [str(word) for word in command]
        module.commands.append(words)
        if "venv" in words:
            (venv / "bin").mkdir(parents=True, exist_ok=True)
            (venv / "bin/python").touch()
            (venv / "bin/pip").touch()

    monkeypatch.setattr(module, "run", record)
    return module


@pytest.fixture
def d2(monkeypatch):
    """install_detectron2 with recorded pip calls. Imports fail until something is installed."""
    module = load_tool("install_detectron2")
    module.calls = []
    monkeypatch.setattr(module, "pip", lambda *arguments: module.calls.append(arguments))
    monkeypatch.setattr(module, "imports", lambda statement: bool(module.calls))
    monkeypatch.setattr("sys.argv", ["install_detectron2.py"])
    return module


def pins() -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines if line)


def test_every_line_of_constraints_is_one_exact_version():
    names = [name.lower() for name in pins()]
    assert len(names) == len(set(names)) > 30


def test_what_setup_declares_is_pinned_inside_its_range(monkeypatch):
    declared = {}
    monkeypatch.setenv("ECO_M2F_BUILD", "none")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: declared.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    pinned = {name.lower(): version for name, version in pins().items()}
    for requirement in map(Requirement, declared["install_requires"]):
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_what_detectron2_needs_is_pinned(d2):
    assert {name.lower() for name in d2.DEPENDENCIES} <= {name.lower() for name in pins()}


@pytest.mark.parametrize("flavour", ["opencv-python", "opencv-python-headless"])
def test_one_opencv_is_installed(env, flavour):
    chosen = env.pinned_requirements(flavour)
    assert len(chosen) == len(pins()) - 1
    assert [line.split("==")[0] for line in chosen if line.startswith("opencv")] == [flavour]


def test_headless_opencv_where_a_system_library_is_missing(env, monkeypatch, capsys):
    def missing(library):
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(env.ctypes, "CDLL", missing)
    assert env.opencv_flavour() == "opencv-python-headless"
    assert "libGL.so.1: cannot open" in capsys.readouterr().out
    monkeypatch.setattr(env.ctypes, "CDLL", lambda library: None)
    assert env.opencv_flavour() == "opencv-python"


def test_the_other_opencv_goes_first(env):
    env.drop_other_opencv("opencv-python")
    assert env.commands == []
    (env.VENV / "lib/python3.11/site-packages/opencv_python_headless-5.0.dist-info").mkdir(parents=True)
    env.drop_other_opencv("opencv-python")
    assert env.commands[0][-3:-2] == ["-y"] and set(env.commands[0][-2:]) == env.OPENCV


def test_a_second_run_does_nothing(env, monkeypatch):
    monkeypatch.setattr("sys.argv", ["setup_env.py"])
    env.main()
    assert any("torch==" in word for command in env.commands for word in command)
    assert any(command[-2:] == ["-e", str(env.ROOT)] for command in env.commands)
    env.commands.clear()
    env.main()
    assert env.commands == []


def test_another_build_mode_rebuilds_the_project_alone(env, monkeypatch):
    monkeypatch.setattr("sys.argv", ["setup_env.py"])
    env.main()
    env.commands.clear()
    monkeypatch.setenv("ECO_M2F_BUILD", "none")
    env.main()
    assert any("-e" in command for command in env.commands)
    assert not any("torch==" in word for command in env.commands for word in command)


def test_a_failed_step_is_redone(env):
    env.VENV.mkdir()
    runs = []

    def fail():
        runs.append("failed")
        raise env.SetupError("no network")

    with pytest.raises(env.SetupError):
        env.step("packages", "key", fail)
    env.step("packages", "key", lambda: runs.append("done"))
    env.step("packages", "key", lambda: runs.append("again"))
    env.step("packages", "other key", lambda: runs.append("other"))
    assert runs == ["failed", "done", "other"]


def test_an_environment_left_half_installed_is_thrown_away(env, monkeypatch):
    env.make_venv()
    (env.VENV / "half").touch()
    env.make_venv()
    assert (env.VENV / "half").exists(), "a whole environment must stay"

    def killed(opencv):
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "pinned_requirements", killed)
    with pytest.raises(KeyboardInterrupt):
        env.install_packages()
    env.make_venv()
    assert not (env.VENV / "half").exists()
    assert env.PYTHON.exists() and not env.UNFINISHED.exists()


def test_an_environment_without_pip_is_made_again(env):
    env.make_venv()
    (env.VENV / "bin/pip").unlink()
    env.make_venv()
    env.make_venv()
    assert [("--clear" in command) for command in env.commands] == [True, True]


def test_a_failing_command_is_named(tmp_path):
    module = load_tool("setup_env")
    with pytest.raises(module.SetupError, match="false --now"):
        module.run("false", "--now")


def test_an_old_python_is_refused(env, monkeypatch):
    monkeypatch.setattr(env.sys, "version_info", (3, 9))
    with pytest.raises(env.SetupError, match="too old: make PYTHON="):
        env.make_venv()


def test_fingerprint_follows_names_and_content(env, tmp_path):
    folder = tmp_path / "csrc"
    folder.mkdir()
    prints = [env.fingerprint(folder)]
    for name, text in [("a.cpp", "1"), ("a.cpp", "2"), ("b.cpp", "")]:
        (folder / name).write_text(text)
        prints.append(env.fingerprint(folder))
    assert len(set(prints)) == 4
    assert env.fingerprint("x", folder) != prints[-1] == env.fingerprint(folder)


def test_one_that_imports_is_kept(d2, monkeypatch, capsys):
    monkeypatch.setattr(d2, "imports", lambda statement: True)
    d2.main()
    assert d2.calls == []
    assert "keeping the installed one" in capsys.readouterr().out


def test_upstream_is_built_where_it_can_be_reached(d2, monkeypatch):
    monkeypatch.setattr(d2, "upstream_is_reachable", lambda: True)
    d2.main()
    assert d2.calls[0][-1] == f"git+{d2.UPSTREAM}@{d2.COMMIT}"
    assert d2.calls[1][:2] == ("install", "--constraint")


def fake_index(d2, monkeypatch, content: bytes) -> None:
    def pip(*arguments):
        d2.calls.append(arguments)
        if arguments[0] == "download":
            folder = arguments[arguments.index("--dest") + 1]
            (Path(folder) / "sal_detectron2-0.7.2-cp310-none-any.whl").write_bytes(content)

    monkeypatch.setattr(d2, "pip", pip)
    monkeypatch.setattr(d2, "upstream_is_reachable", lambda: False)


def test_the_wheel_is_taken_otherwise(d2, monkeypatch):
    fake_index(d2, monkeypatch, b"wheel")
    monkeypatch.setattr(d2, "WHEEL_SHA256", hashlib.sha256(b"wheel").hexdigest())
    d2.main()
    assert [call[0] for call in d2.calls] == ["download", "install", "install"]
    assert "--target" in d2.calls[1] and "--no-deps" in d2.calls[1]
    assert set(d2.DEPENDENCIES) <= set(d2.calls[2])


def test_another_wheel_is_not_installed(d2, monkeypatch):
    fake_index(d2, monkeypatch, b"something else")
    with pytest.raises(d2.InstallError, match=f"sha256 .*expected {d2.WHEEL_SHA256}.*Nothing was installed"):
        d2.main()
    assert [call[0] for call in d2.calls] == ["download"]


def test_one_that_does_not_import_in_the_end_is_an_error(d2, monkeypatch):
    monkeypatch.setattr(d2, "upstream_is_reachable", lambda: True)
    monkeypatch.setattr(d2, "imports", lambda statement: False)
    with pytest.raises(d2.InstallError, match="installed but does not import"):
        d2.main()


def test_a_failing_pip_is_named():
    module = load_tool("install_detectron2")
    with pytest.raises(module.InstallError, match="this command failed.*no-such-pip-command"):
        module.pip("no-such-pip-command")


@pytest.mark.parametrize("error", [FileNotFoundError("git"), "timeout"])
def test_no_git_and_a_silent_network_are_unreachable(d2, monkeypatch, error):
    def fail(*arguments, **options):
        assert options["timeout"] <= 30
        raise d2.subprocess.TimeoutExpired("git", 15) if error == "timeout" else error

    monkeypatch.setattr(d2.subprocess, "run", fail)
    assert d2.upstream_is_reachable() is False

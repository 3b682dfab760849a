"""Packaging: a built wheel carries configs and corpus, and its commands work from an empty directory."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked kinds of files, so that nothing is written into the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("xattn", "experiments", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("xattn-*.whl")
    return path


def test_the_wheel_holds_every_config_and_the_corpus(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"xattn/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    shipped |= {f"xattn/{p.relative_to(ROOT)}" for p in (ROOT / "experiments" / "corpora").iterdir()}
    assert len(shipped) > 15
    assert shipped <= inside
    assert "xattn/configs/__init__.py" in inside


def test_installed_commands_work_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=120, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    train = [str(target / "bin" / "xattn-train"), "+debug=fast", "run_dir=here", "trainer.steps=2"]
    done = subprocess.run(train, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (empty / "here" / "result.json").is_file()
    code = "import xattn, xattn.experiments.compose as c; print(xattn.__file__); print(c.CONFIGS)"
    where = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True)
    assert all(line.startswith(str(target)) for line in where.stdout.split()), "the checkout was tested, not the wheel"


def test_every_console_script_names_a_function_that_exists() -> None:
    text = (ROOT / "setup.py").read_text()
    for command, module in (("train", "train"), ("compare", "compare"), ("eval", "evaluate"), ("generate", "generate")):
        assert f"xattn-{command}=xattn.experiments.{module}:main" in text
        spec = importlib.util.find_spec(f"xattn.experiments.{module}")
        assert spec is not None and "def main() -> None" in Path(spec.origin).read_text()

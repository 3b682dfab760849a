"""Promise of the documentation: its examples run, print what they say, and its generated page is fresh."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CACHES = (ROOT / "docs" / "caches.md").read_text(encoding="utf-8")
SHOWN = re.compile(r"```python\n(.*?)```\n+```text\n(.*?)```", re.DOTALL)
EXAMPLES, CACHE_EXAMPLES = SHOWN.findall(README), SHOWN.findall(CACHES)


@pytest.mark.parametrize("code, printed", EXAMPLES + CACHE_EXAMPLES, ids=lambda text: text.split("\n")[0][:30])
def test_example_prints_what_its_page_says(code, printed, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.rstrip() for line in done.stdout.splitlines()] == [line.rstrip() for line in printed.splitlines()]


def test_every_python_example_of_the_readme_is_run():
    assert len(EXAMPLES) == README.count("```python") >= 2
    assert len(CACHE_EXAMPLES) == CACHES.count("```python") >= 2


def test_warning_quoted_in_the_readme_is_the_one_given(tmp_path):
    quoted = re.search(r"# FlagWarning: (.*)", README)[1]
    done = subprocess.run([sys.executable, "-c", EXAMPLES[1][0]], capture_output=True, text=True, cwd=tmp_path)
    assert quoted in done.stderr


def test_ci_runs_exactly_the_readmes_test_command():
    command = "pip install -e '.[test]' && pytest -n 2"
    assert f"```bash\n{command}\n```" in README
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_flag_page_is_fresh():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_flags import render
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == render(), "run: python docs/make_flags.py"

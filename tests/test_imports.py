"""Who may import whom: arrows point down, and `import xattn` costs torch, einops and safetensors only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what each part of xattn may import of the others; parts not listed stand above them all
MAY_IMPORT = {
    "errors": set(),
    "shapes": {"errors"},
    "spec": {"errors", "shapes"},
    "kernels": {"errors", "shapes"},
    "ops": {"errors", "shapes", "spec", "kernels"},
    "cache": {"errors", "shapes", "spec", "ops"},
    "generate": {"errors", "shapes", "spec", "ops", "cache"},
    "nn": {"errors", "shapes", "spec", "ops", "cache", "generate"},
}
# what only some may import, and who
RESERVED = {
    "triton": {"kernels"},
    "hydra": {"experiments"},
    "omegaconf": {"experiments"},
    "wandb": {"experiments"},
    "matplotlib": {"experiments"},
}
HEAVY = ("triton", *RESERVED, "numpy.f2py", "transformers", "datasets", "pandas")


def files() -> list[Path]:
    """Every module of the library, experiments included."""
    return sorted([*(ROOT / "xattn").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])


def part_of(path: Path) -> str:
    """The part of xattn that a file belongs to: its folder, or its name."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return names[0] if names[0] == "experiments" else names[1]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names of what a file imports, and whether on import rather than within a function."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", at_once) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return walk(ast.parse(path.read_text()), True)


def own(name: str) -> str | None:
    """The part of xattn that a dotted name lies in; "" for the package itself, None for anything else."""
    head, *rest = name.split(".")
    if head != "xattn":
        return None
    known = {part_of(path) for path in files()} | set(MAY_IMPORT)
    return rest[0] if rest and rest[0] in known else ""


def test_the_walk_finds_the_library_and_its_imports() -> None:
    found = {part_of(path) for path in files()}
    assert {"errors", "shapes", "spec", "ops", "nn"} <= found
    edges = {(part_of(path), own(name)) for path in files() for name, _ in imports(path)}
    assert ("ops", "spec") in edges and ("spec", "errors") in edges


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    part = part_of(path)
    for name, _ in imports(path):
        target = own(name)
        if target is None or target == part:
            continue
        assert target != "experiments", f"{part} imports {name}: nothing below may know the experiments"
        if part in MAY_IMPORT:
            allowed = ", ".join(sorted(MAY_IMPORT[part])) or "nothing of xattn"
            assert target in MAY_IMPORT[part], f"{part} imports {name}; it may import {allowed}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_imports_torch_einops_and_for_checkpoints_safetensors_only(path: Path) -> None:
    part = part_of(path)
    for name, at_once in imports(path):
        head = name.split(".")[0]
        if head in RESERVED:
            assert part in RESERVED[head], f"only {', '.join(RESERVED[head])} may import {head}"
        if part not in ("experiments", "kernels") and at_once:
            allowed = {"xattn", "torch", "einops", *sys.stdlib_module_names}
            allowed |= {"safetensors"} if part == "checkpoint" else set()
            assert head in allowed, f"{path.name} imports {head} at once"
        if own(name) == "kernels" and part != "kernels":
            assert not at_once, f"{path.name} imports {name} before a kernel is needed"


def test_a_back_end_never_imports_the_definition_it_is_measured_by() -> None:
    for path in (ROOT / "xattn").rglob("*.py"):
        if path.name != "backends.py":
            assert not any(name.startswith("xattn.ops.reference") for name, _ in imports(path)), path


def loaded_by(code: str) -> set[str]:
    """Which heavy packages are loaded after running code in a fresh process."""
    tell = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_xattn_loads_neither_triton_nor_anything_of_the_experiments() -> None:
    by_torch = loaded_by("import torch, einops")
    assert loaded_by("import xattn") <= by_torch
    assert not by_torch & set(RESERVED), "torch itself loads it, so this test can say nothing"


def test_attending_on_a_cpu_loads_no_triton() -> None:
    code = (
        "import torch\n"
        "from xattn.ops.attention import attend\n"
        "from xattn.spec.flags import parse_attention\n"
        "x = torch.zeros(1, 2, 3, 4)\n"
        "attend(x, x, x, spec=parse_attention(heads=2, dim_head=4, attn_selective=True))\n"
        "attend(x, x, x, spec=parse_attention(heads=2, dim_head=4))\n"
    )
    assert "triton" not in loaded_by(code)

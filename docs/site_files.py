"""A hook of MkDocs: the site has the repository's folders, so that links in README.md and docs/ hold in both."""

from pathlib import Path

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]
# Pages, and what they show or offer.
PARTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/*.ipynb",
    "eval/README.md",
    "eval/published.yaml",
    "results/**/*",
    "training/README.md",
)


def on_files(files: Files, config) -> Files:
    """Instead of the files of `docs/` alone, those of `PARTS`; what the theme brings stays."""
    own = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    found = sorted(path for part in PARTS for path in ROOT.glob(part) if path.is_file())
    own += [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=path.as_posix()) for path in found]
    return Files(own)

"""What parameters a notebook declares, and what a profile gives it: unknown names and wrong types are errors."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from paper_src import InputError
from paper_src.reporting.graph import code_of

TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list}


def declared(notebook: Path) -> dict[str, str]:
    """Parameters that a notebook declares: name -> type name, from its cell tagged ``parameters``."""
    lines = ast.parse(code_of(notebook, tag="parameters")).body
    return {line.target.id: ast.unparse(line.annotation) for line in lines if isinstance(line, ast.AnnAssign)}


def check_types(types: Mapping[str, str], values: Mapping[str, object]) -> Iterable[str]:
    """The declared names, once each value in ``values`` has the declared type."""
    for name, kind in types.items():
        if name not in values:
            continue
        value, wanted = values[name], TYPES.get(kind.split("[")[0])
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
            raise InputError(f"parameter {name} = {value!r}: its type is {kind}")
    return types


def parameters_for(notebook: Path, profile: Path, overrides: dict[str, object]) -> dict[str, object]:
    """Parameters of one notebook: the profile's ``common`` ones that it declares, its own, the overrides.

    Raises:
        InputError: no such profile, or a parameter that the notebook does not declare, or of another type.
    """
    types = declared(notebook)
    settings = read_profile(profile)
    own = settings.get(notebook.stem) or {}
    if unknown := sorted(own.keys() - types.keys()):
        raise InputError(f"{profile}: {notebook.stem} has no parameter {unknown[0]!r}, it has {sorted(types)}")
    shared = {key: value for key, value in {**settings["common"], **overrides}.items() if key in types}
    values = {**shared, **own, **{key: value for key, value in shared.items() if key in overrides}}
    check_types(types, values)
    return values


def read_profile(path: Path) -> dict[str, dict]:
    """A profile: notebook name, or ``common``, -> parameters. Names of notebooks are checked."""
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise InputError(f"no profile {path.stem!r}: there are {known}")
    try:
        settings = {name: dict(part) for name, part in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no YAML of notebooks and their parameters: {reason}") from error
    notebooks = {file.stem for file in Path("notebooks").glob("*.ipynb")}
    if unknown := sorted(settings.keys() - notebooks - {"common"}):
        raise InputError(f"{path}: no notebook {unknown[0]!r}, there are {sorted(notebooks)}")
    return {"common": {}, **settings}


def check_profile(path: Path) -> None:
    """Check every parameter of a profile against the notebooks, before anything runs."""
    settings = read_profile(path)
    notebooks = sorted(Path("notebooks").glob("*.ipynb"))
    everywhere = set().union(*(declared(notebook) for notebook in notebooks))
    if unknown := sorted(settings["common"].keys() - everywhere):
        raise InputError(f"{path}: no notebook has the common parameter {unknown[0]!r}")
    for notebook in notebooks:
        parameters_for(notebook, path, {})

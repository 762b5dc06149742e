"""site_facts: which site a recipe means, from a profile or probed.

`site: auto` means, in this order: $LAUNCHER_SITE; the cluster whose controller answers here (with the profile of that
name, if there is one); this machine. A name means NAME.yaml in ./slurm, in ~/.config/launcher/sites or among the
shipped profiles. What a profile leaves out is probed.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from launcher.errors import ClusterError, LauncherError
from launcher.facts.learned import SUFFIX, Learned, learned_path
from launcher.facts.offer import Container, Partition, Site
from launcher.facts.probe import cluster_name, probe_machine, probe_slurm, slurm_answers
from launcher.facts.profile import read_learned, read_profile
from launcher.recipe.problems import nearest
from launcher.recipe.shipped import shipped_folder

__all__ = ["Container", "Partition", "Site", "profile_path", "site_facts", "with_learned"]

_REQUIRED = ("executor", "gpu", "gpus_per_node", "max_nodes", "cpus_per_node", "mem_bytes_per_node")


def site_facts(profile: str | None) -> Site:
    """The site of a recipe: `profile` is a name, a path, or None or "auto".

    Raises:
        ClusterError: unknown name, a wrong profile, or facts that neither the profile nor probing gives.
        TemporaryError: the facts left out must come from a Slurm that does not answer.
    """
    wanted = profile if profile not in (None, "auto") else os.environ.get("LAUNCHER_SITE")
    if wanted:
        return _from_profile(profile_path(wanted))
    if not slurm_answers():
        return _build({}, "")
    known = _profile_of_cluster(cluster_name())
    return _from_profile(known) if known else _build({"executor": "slurm"}, "asked of Slurm")


def profile_path(name: str) -> Path:
    """The profile file that a name or path means.

    Raises:
        ClusterError: there is none; lists the names that are known.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ClusterError(f"slurm.site: no site profile at {name}")
    known = _profiles()
    if name in known:
        return known[name]
    close = nearest(name, known)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ClusterError(f"slurm.site: no site profile {name!r}; {hint}known: {', '.join(sorted(known)) or 'none'}")


def _profiles() -> dict[str, Path]:
    """Name -> profile; the folder of the user's project comes before the user's own, the shipped ones last."""
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    folders = [shipped_folder("slurm"), settings / "launcher" / "sites", Path("slurm")]
    found = (path for folder in folders for path in sorted(folder.glob("*.yaml")))
    return {path.stem: path for path in found if not path.stem.endswith(SUFFIX)}


def _profile_of_cluster(cluster: str) -> Path | None:
    """The profile named like the cluster, whatever the spelling (devcluster, dev-cluster)."""
    same = {_letters(name): path for name, path in _profiles().items()}
    return same.get(_letters(cluster))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _from_profile(path: Path) -> Site:
    site = _build(read_profile(path), str(path))
    beside = (path.with_name(f"{path.stem}{SUFFIX}.yaml"), learned_path(path))
    found = next((each for each in beside if each.is_file()), None)
    return with_learned(site, read_learned(found)) if found else site


def with_learned(site: Site, learned: Learned) -> Site:
    """The site with what its runs taught; measured bandwidths replace the profile's."""
    return replace(
        site,
        learned=learned,
        intra_node_bw_bytes_s=learned.intra_node_bw_bytes_s or site.intra_node_bw_bytes_s,
        inter_node_bw_bytes_s=learned.inter_node_bw_bytes_s or site.inter_node_bw_bytes_s,
    )


def _build(given: dict[str, Any], origin: str) -> Site:
    """Complete `given` (from `origin`) with what probing finds."""
    executor = given.get("executor", "local")
    probed = _probed(executor, given, origin)
    asked = "asked of Slurm" if executor == "slurm" else "this machine"
    values = probed | given
    if not values.get("venv") and os.environ.get("LAUNCHER_VENV"):
        values["venv"] = os.environ["LAUNCHER_VENV"]
    source = {key: origin if key in given else asked for key in values}
    names = {field.name for field in fields(Site)}
    return Site(**{key: value for key, value in values.items() if key in names}, source=source)


def _probed(executor: str, given: dict[str, Any], origin: str) -> dict[str, Any]:
    """What is not given: probed, if anything that must be known is missing."""
    missing = [key for key in _REQUIRED if key not in given]
    if not missing:
        return {}
    if executor == "local":
        return _machine_for(given)
    try:
        return probe_slurm()
    except LauncherError as error:
        if not origin or origin == "asked of Slurm":
            raise
        raise type(error)(
            f"{origin} leaves out {', '.join(missing)}, which Slurm was asked for:", *error.problems
        ) from error


def _machine_for(given: dict[str, Any]) -> dict[str, Any]:
    """This machine's facts; a profile that says "cpu" is not given the machine's GPUs."""
    machine = probe_machine()
    if given.get("gpu") == "cpu":
        machine |= {"gpus_per_node": 1, "request_gpus": False}
    return machine

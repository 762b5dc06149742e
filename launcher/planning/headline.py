"""One line that says what a plan runs on and what it is predicted to take: the first line of shipped recipes."""

from __future__ import annotations

from launcher.facts.site import Site
from launcher.planning.plan import Candidate, Plan

_GIB = 2**30


def headline(plan: Plan, site: Site) -> str:
    """Such as `8 nodes x 8 A100-80GB: peak 45 GiB per GPU, 3.9 hours, 248 GPU-hours (predicted)`."""
    chosen = plan.chosen
    peak = f"peak {_two_digits(chosen.memory.peak_bytes.expected / _GIB)} GiB"
    parts = [peak + (" per GPU" if chosen.candidate.world_size > 1 else ""), duration(chosen.wall_s)]
    if chosen.candidate.device == "cuda" and chosen.candidate.world_size > 1:
        parts.append(f"{_two_digits(chosen.gpu_hours)} GPU-hours")
    fit = "predicted" if chosen.fits else "predicted: does not fit"
    return f"{_hardware(chosen.candidate, site)}: {', '.join(parts)} ({fit})"


def duration(seconds: float) -> str:
    """Minutes below an hour, hours below two days, else days."""
    if seconds < 3600:
        minutes = max(1, round(seconds / 60))
        return f"{minutes} minute{'s' if minutes > 1 else ''}"
    if seconds < 48 * 3600:
        return f"{_two_digits(seconds / 3600)} hours"
    return f"{_two_digits(seconds / 86400)} days"


def _hardware(candidate: Candidate, site: Site) -> str:
    nodes = f"{candidate.nodes} nodes x " if candidate.nodes > 1 else ""
    if candidate.device == "cpu":
        ranks = f"{candidate.gpus_per_node} rank{'s' if candidate.gpus_per_node > 1 else ''}"
        return f"{nodes}{site.cpus_per_node} CPU cores, {ranks}"
    times = "" if candidate.nodes > 1 else "x "
    return f"{nodes}{candidate.gpus_per_node} {times}{candidate.gpu}"


def _two_digits(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 else f"{number:,.0f}"

"""The description of the machine that stands beside every figure, without host names or paths."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "numpy", "numba")
GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def machine() -> dict[str, object]:
    """Return the record of this machine in its present state; no setting is changed."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": _gpu(),
        "versions": {"python": platform.python_version(), **_versions()},
        "cuda": torch.version.cuda,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "commit": commit(Path(__file__).resolve().parent),
    }


def line(record: dict[str, object]) -> str:
    """Return a record of `machine` as one line of text."""
    gpu = record["gpu"]
    parts = [f"{record['cpu']}, {record['cores']} cores, {record['threads']} threads, load {record['load']}"]
    if isinstance(gpu, dict):
        clocks = f"{gpu.get('clocks.sm', '?')} of {gpu.get('clocks.max.sm', '?')}"
        parts.append(f"{gpu.get('name', '?')}, driver {gpu.get('driver_version', '?')}, SM clock {clocks}")
    else:
        parts.append("no GPU")
    versions = record["versions"]
    assert isinstance(versions, dict)
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    parts.append(f"{record['date']}, commit {record['commit']}")
    return " | ".join(parts)


def commit(folder: Path) -> str | None:
    """Return the commit that holds a folder, with "+" where tracked files differ from it; None where none does."""
    if not _output_of(["git", "ls-files", "."], folder):
        return None
    name = _output_of(["git", "rev-parse", "--short", "HEAD"], folder)
    changed = _output_of(["git", "status", "--porcelain", "--untracked-files=no"], folder)
    return name and name + ("+" if changed else "")


def short_name(record: dict[str, object]) -> str:
    """Return the name of this machine in result files: the GPU's name, or "cpu"."""
    gpu = record["gpu"]
    name = str(gpu["name"]) if isinstance(gpu, dict) else "cpu"
    return "-".join(name.lower().removeprefix("nvidia ").split())


def processor(device: str = "cpu") -> str:
    """Return the name of what computes on a device, for results that are gathered on several machines."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _output_of(command: list[str], where: Path | None = None) -> str | None:
    try:
        run = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _gpu() -> dict[str, str] | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    text = _output_of([*query, f"--id={torch.cuda.get_device_properties(0).uuid}"]) or _output_of(query)
    if not text:
        return {"name": torch.cuda.get_device_name()}
    return dict(zip(GPU_FIELDS, (field.strip() for field in text.splitlines()[0].split(",")), strict=True))

"""The reading of `prepare` measured: time against a bare loop, memory of all processes."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pydicom

from fedcmr.client.ingest.cine import Study
from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.simulations import processes
from fedcmr.simulations.benchmarks.ingest_seeds import NUM_PHASES, NUM_SLICES, STUDY_NUMBER, write_seeds
from fedcmr.simulations.benchmarks.stages import watched

SAMPLE_INTERVAL_S = 0.1


def files_per_second(source: Path, num_processes: int, repeats: int) -> dict[str, float]:
    """Medians of both, which take turns, and of their quotient; starting the processes does not count."""
    paths = [str(path) for path in sorted(source.rglob("*.dcm"))]
    parts = [paths[index::num_processes] for index in range(num_processes)]
    seconds: dict[str, list[float]] = {"prepare": [], "bare": []}
    with processes.workers(num_processes) as bare, Workers(num_processes) as workers:
        read: dict[str, Callable[[], int]] = {
            "prepare": partial(read_as_prepare, source, workers),
            "bare": lambda: sum(processes.map_unordered(bare, read_bare, parts)),
        }
        for repeat in range(repeats + 1):
            for name, function in read.items():
                started = time.perf_counter()
                num_read = function()
                assert num_read == len(paths), "both read every file"
                if repeat > 0:  # the first fills the disk's cache, and imports
                    seconds[name].append(time.perf_counter() - started)
    shares = [plain / ours for plain, ours in zip(seconds["bare"], seconds["prepare"], strict=True)]
    rates = {name: len(paths) / statistics.median(values) for name, values in seconds.items()}
    return rates | {"share": statistics.median(shares), "num_files": len(paths)}


def read_as_prepare(source: Path, workers: Workers) -> int:
    """Find and read every study as `prepare` does, to the pixels; returns the number of images."""
    total = 0
    for _, result in workers.as_finished(read_study, find_dicom(source, workers).studies):
        if isinstance(result, Unusable):
            raise result
        total += result
    return total


def read_study(study: Study) -> int:
    """Read one study in a child process; returns the number of its images."""
    num_phases, num_slices = study.read().images.shape[:2]
    return num_phases * num_slices


def read_bare(paths: list[str]) -> int:
    """The loop that a script would have; returns the number of images."""
    return sum(pydicom.dcmread(path).pixel_array.ndim == 2 for path in paths)


def compress(source: Path, target: Path, syntax: str) -> None:
    """The same files in another transfer syntax."""
    for path in source.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(out)


def write_studies(folder: Path, num_files: int) -> None:
    """Small studies of different patients, all files of one size."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        study = write_seeds(Path(temporary) / "seeds").study
        originals = {path.name: path.read_bytes() for path in sorted(study.iterdir())}
    for number in range(-(-num_files // (NUM_SLICES * NUM_PHASES))):
        own = folder / f"{number:05d}"
        own.mkdir(parents=True)
        other = str(int(STUDY_NUMBER) + number).encode()
        for name, content in originals.items():
            (own / name).write_bytes(content.replace(STUDY_NUMBER.encode(), other))


def peak_memory(source: Path, destination: Path, num_processes: int) -> dict[str, float]:
    """Run `fedcmr-client prepare` and watch it."""
    command = [sys.executable, "-m", "fedcmr.client.cli", "prepare", "--format", "dicom", str(source), str(destination)]
    command += ["--num-processes", str(num_processes)]
    seconds, peak_kb = watched(command, "fedcmr-client prepare", SAMPLE_INTERVAL_S)
    num_files = sum(1 for path in source.rglob("*.dcm"))
    num_cases = sum(1 for path in (destination / "cases").iterdir())
    return {
        "num_files": num_files,
        "num_cases": num_cases,
        "peak_mib": peak_kb / 1024,
        "files_per_second": num_files / seconds,
    }

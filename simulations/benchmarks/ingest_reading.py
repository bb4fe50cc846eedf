"""The reading of `prepare` measured: time against a bare loop, memory of all processes."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pydicom

from fedcmr.client.ingest.cine import Study
from fedcmr.client.ingest.dicom.reader import find_dicom
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.layout import Options
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.shared.file_names import MASKS_NAME
from fedcmr.shared.orientation import LPS_TO_RAS
from fedcmr.simulations import processes
from fedcmr.simulations.benchmarks.ingest_seeds import NUM_PHASES, NUM_SLICES, STUDY_NUMBER, write_seeds
from fedcmr.simulations.benchmarks.stages import watched

SAMPLE_INTERVAL_S = 0.1


def images_per_second(source: Path, num_processes: int, repeats: int, layout: str = "dicom") -> dict[str, float]:
    """Medians of both, which take turns, and of their quotient; starting the processes does not count.

    Args:
        source: Scans without masks.
        num_processes: That read them.
        repeats: Of which the median counts.
        layout: "dicom", where a file is an image, or "plain", where a file holds those of all slices and phases.
    """
    paths = [str(path) for path in sorted(source.rglob("*.*")) if path.is_file()]
    parts = [paths[index::num_processes] for index in range(num_processes)]
    seconds: dict[str, list[float]] = {"prepare": [], "bare": []}
    num_images = set()
    with processes.workers(num_processes) as bare, Workers(num_processes) as workers:
        read: dict[str, Callable[[], int]] = {
            "prepare": partial(read_as_prepare, source, workers, layout),
            "bare": lambda: sum(processes.map_unordered(bare, read_bare, parts)),
        }
        for repeat in range(repeats + 1):
            for name, function in read.items():
                started = time.perf_counter()
                num_read = function()
                num_images.add(num_read)
                if repeat > 0:  # the first fills the disk's cache, and imports
                    seconds[name].append(time.perf_counter() - started)
    assert len(num_images) == 1, "both read every image"
    number = num_images.pop()
    shares = [plain / ours for plain, ours in zip(seconds["bare"], seconds["prepare"], strict=True)]
    rates = {name: number / statistics.median(values) for name, values in seconds.items()}
    return rates | {"share": statistics.median(shares), "num_files": len(paths), "num_images": number}


def read_as_prepare(source: Path, workers: Workers, layout: str = "dicom") -> int:
    """Find and read every study as `prepare` does, to the pixels; returns the number of images."""
    total = 0
    for _, result in workers.as_finished(read_study, LAYOUTS[layout].find(source, Options(), workers).studies):
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
    total = 0
    for path in paths:
        is_nifti = path.endswith(".nii.gz")
        array = np.asarray(nibabel.load(path).dataobj) if is_nifti else pydicom.dcmread(path).pixel_array
        total += array.size // (array.shape[0] * array.shape[1])
    return total


def convert(source: Path, target: Path) -> None:
    """The cines of DICOM files as compressed NIfTI in the plain layout."""
    (target / "frames").mkdir(parents=True)
    for number, study in enumerate(find_dicom(source).studies):
        cine = study.read()
        assert cine.axes is not None
        affine = np.eye(4)
        affine[:3, :3] = LPS_TO_RAS[:3, :3] @ (cine.axes * np.array(cine.spacing_mm)[:, None])[::-1].T
        image = nibabel.Nifti1Image(cine.images.T.astype(np.int16), affine)
        nibabel.save(image, target / "frames" / f"P{number}.nii.gz")


def compress(source: Path, target: Path, syntax: str) -> None:
    """The same files in another transfer syntax."""
    for path in source.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(out)


def write_studies(folder: Path, num_files: int, masks: bool = False) -> None:
    """Small studies of different patients, all files of one size.

    Args:
        folder: To make.
        num_files: Images, at least.
        masks: With a file of masks in each study, so that no segmenter has to look for the heart.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        seeds = write_seeds(Path(temporary) / "seeds")
        originals = {path.name: path.read_bytes() for path in sorted(seeds.study.iterdir())}
        if masks:
            originals[MASKS_NAME] = seeds.masks[MASKS_NAME]
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

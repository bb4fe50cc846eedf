"""A tiny study without privacy ends in the bits that it once ended in: a change of structure changes no number.

The hashes are those of torch 2.13.0 with kernels that are the same on every processor (`KERNELS`), recorded by the code
of version 0.1.0. A change that is meant to change numbers records them anew:
`python -m tests.test_recorded_weights FOLDER` prints what they are.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[1]
TORCH = "2.13.0"
KERNELS = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
SETTINGS = (
    "privacy.enabled=false",
    "hospitals.vendors=[Siemens,GE]",
    "hospitals.num_train=2",
    "hospitals.num_test=2",
    "synthesis.num_cases=4",
    "regression.num_steps=2",
    "federation.num_rounds=2",
    "federation.num_processes=1",
    "evaluation.baselines=[]",
)
RECORDED = {
    "checkpoints/round_0000.safetensors": "3a8d3ced24dbb0221d3524b23f9c65c8daec429f1d812b4f5219ffcfc026542a",
    "checkpoints/round_0001.safetensors": "ed5aec7b9bcdc2215d2587e302d29080c85fed96b0fb6fe3d086d53b212a68d3",
    "checkpoints/round_0002.safetensors": "59ca2d4ca779dddc29e62753622b47ffb1ee6512cccb37e1dd98e80620a6762b",
    "generator.safetensors": "04381c2b8a3f87b74c6847d97dabd7232915f157206f8346f5992ca541111a8f",
    "regressor.safetensors": "97bf1154fbed0207fdf748cdb186ad4fc8bbd32cbedcd93ed3e1a02dd4d4dd46",
    "synthetic": "dcf8afb2d5e7af427e8e65ad72f15909c27248cfd506263bb8b992abcf69d3a5",
}


def hashes(folder: Path) -> dict[str, str]:
    """What the study's arrays hold, by file; of the synthetic cases together."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        digest = hashlib.sha256()
        for name, array in sorted(load_file(path).items()):
            digest.update(name.encode() + str(array.dtype).encode() + array.tobytes())
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    digest = hashlib.sha256()
    for path in sorted((folder / "synthetic" / "cases").glob("*.npz")):
        with np.load(path) as case:
            for name in sorted(case):
                digest.update(case[name].tobytes())
    return found | {"synthetic": digest.hexdigest()}


def run_study(folder: Path) -> None:
    command = [Path(sys.executable).parent / "fedcmr-simulate", "--config", "smoke", "--out", folder]
    done = subprocess.run(
        [*map(str, command), *SETTINGS],
        cwd=ROOT,
        env=os.environ | KERNELS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != TORCH, reason=f"recorded with torch {TORCH}, here is {torch.__version__}"
)
def test_a_study_without_privacy_ends_in_the_recorded_bits(tmp_path):
    run_study(tmp_path / "run")
    assert hashes(tmp_path / "run") == RECORDED


if __name__ == "__main__":
    run_study(Path(sys.argv[1]))
    for name, digest in hashes(Path(sys.argv[1])).items():
        print(name, digest)

"""A tiny study without privacy ends in the bits that it once ended in: a change of structure changes no number.

The hashes are those of torch 2.13.0 with kernels that are the same on every processor (`KERNELS`), recorded by the code
of version 0.1.0 before its packages were sorted by subject. A change that is meant to change numbers records them anew:
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
    "checkpoints/round_0001.safetensors": "8ef0703f8f9efb06820693cca3cc02890e26de1f6c99cc964abf310b1aa9d99c",
    "checkpoints/round_0002.safetensors": "69c126069ebb88cc2cb0108a708debb025dcdfd02154c7bec2143746b7fe2935",
    "generator.safetensors": "f643dc2084c289c60aed7c04807e0763c86909f7ba9c35a7b4dc913323c8f85d",
    "regressor.safetensors": "32a5882be666a8db714bfc2a6b000ccc011d139a08a50ed5679aaaf109bdab69",
    "synthetic": "e855f694d554773c8396cd40666dcadb88968e5742d4bad65adce27a4f065d7e",
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

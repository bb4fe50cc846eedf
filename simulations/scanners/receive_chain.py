"""What the receiver adds: coil shading and its correction, off-resonance, k-space sampling, apodisation, noise."""

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from fedcmr.simulations.patients.heart import Patient, extent_mm
from fedcmr.simulations.scanners.contrast import Relaxation, bssfp_signal
from fedcmr.simulations.scanners.rendering import enlarge

Float = NDArray[np.floating]

STEP = 8  # pixels between the points where the smooth fields are computed


class ReceiveFields:
    """Smooth fields of one scan: coil sensitivity, the vendor's correction of it, parallel imaging, off-resonance."""

    def __init__(
        self,
        patient: Patient,
        field_strength_t: float,
        shading: float,
        g_factor: float,
        rng: np.random.Generator,
    ) -> None:
        angles = np.radians([-150, -110, -70, -30, 40, 100, 150])  # elements around the chest, most of them in front
        to_rv = extent_mm(patient)[0]
        radius = np.where(angles < 0, 0.79 * to_rv + 40, 130) + rng.normal(0, 8, len(angles)) + patient.subcutaneous_mm
        self.elements = np.stack([1.25 * radius * np.cos(angles), radius * np.sin(angles), rng.normal(0, 40, 7)], 1)
        self.reach_mm = rng.uniform(95, 130)
        self.shading = shading
        self.g_factor = g_factor
        self.off_resonance_hz = field_strength_t * rng.normal([6, -5, 8, 4, 5], 3)

    def at(
        self, points_mm: Float, tr_ms: float, tissue: Relaxation, flip_angle_deg: float
    ) -> tuple[Float, Float, Float]:
        """(sensitivity x banding before sampling, correction after it, noise amplification), each (H, W)."""
        coarse = points_mm[::STEP, ::STEP]
        away = ((coarse[..., None, :] - self.elements) ** 2).sum(-1) / self.reach_mm**2
        # The sum of squares of the elements; weights of an optimal combination leave uniform noise.
        sensitivity = np.sqrt(((1 + away) ** -3).sum(-1))
        sensitivity /= np.sqrt(((1 + (self.elements**2).sum(-1) / self.reach_mm**2) ** -3).sum())
        left, back, up = np.moveaxis(coarse, -1, 0) / 100
        terms = np.stack([left, back, left**2 - up**2, left * back, back * up], -1)
        hertz = terms @ self.off_resonance_hz.astype(np.float32) * (1 + (coarse**2).sum(-1) / 150**2)
        dephasing = 2 * np.pi * hertz * tr_ms / 1000
        centre = 1 + (self.g_factor - 1) * np.exp(-(coarse**2).sum(-1) / 90**2)
        shape = points_mm.shape[:2]
        sensitivity, dephasing, centre = (enlarge(a, shape, STEP) for a in (sensitivity, dephasing, centre))
        banding = bssfp_signal(tissue, tr_ms, flip_angle_deg, dephasing)
        banding = np.asarray(banding / bssfp_signal(tissue, tr_ms, flip_angle_deg), np.float32)
        return sensitivity * banding, sensitivity ** np.float32(self.shading - 1), centre


def k_space_window(shape: tuple[int, int], sampled: tuple[float, float], apodisation: float) -> Float:
    """Apodisation of the sampled rectangle of k-space, zero frequency in its middle, shape (h, w) with h and w odd."""
    factors = []
    for size, part in zip(shape, sampled, strict=True):
        reach = int(size * part / 2)
        hann = 0.5 + 0.5 * np.cos(np.pi * np.arange(-reach, reach + 1) / (reach + 1))
        factors.append(1 - apodisation + apodisation * hann)
    return np.outer(*factors).astype(np.float32)


def receive(scene: Float, window: Float, noise_level: Float, rng: np.random.Generator) -> Float:
    """Magnitude images of real scenes (T, H, W): k-space sampled, apodised, zero-filled, with noise.

    `noise_level` (H, W) is the standard deviation of the noise in the real and in the imaginary part of the image.
    """
    size = scene.shape[1:]
    high, wide = (length // 2 for length in window.shape)
    spectrum = fft.rfft2(scene)
    spectrum[:, : high + 1, : wide + 1] *= window[high:, wide:]
    spectrum[:, -high:, : wide + 1] *= window[:high, wide:]
    spectrum[:, high + 1 : -high] = 0
    spectrum[:, :, wide + 1 :] = 0
    image = fft.irfft2(spectrum, s=size)
    drawn = rng.standard_normal((len(scene), *window.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    drawn *= window * np.float32(size[0] * size[1] / np.sqrt((window**2).sum()))
    # The block is transformed from k-space's corner and moved to the middle by a phase ramp (shift theorem).
    down, right = np.arange(size[0])[:, None] * high / size[0], np.arange(size[1]) * wide / size[1]
    centring = np.exp(-2j * np.pi * (down + right)).astype(np.complex64)
    noise = fft.ifft2(drawn, s=size) * (centring * noise_level)
    return np.hypot(image + noise.real, noise.imag)

"""Three vendors' cine acquisition: balanced-SSFP contrast, slice stack, coils, k-space, noise, intensity scale.

Modelled: steady-state signal of every tissue from T1, T2 and proton density at the site's field strength, TR and flip
angle; fat in opposed phase (black borders where it meets water); off-resonance banding toward the edge of the field of
view; the receive coils' shading after the vendor's own correction; a k-space sampled on a coarser matrix than the
image, apodised and zero-filled (blurring, Gibbs ringing); complex Gaussian noise in k-space, amplified toward the
centre by parallel imaging, hence Rician in the magnitude image; breath-hold shifts between slices.
Not modelled: spiral, radial or undersampled reconstruction and its artefacts, flow and gating artefacts, gradient
non-linearity, fold-over, partial echo, the transition to steady state, T2* and magnetisation transfer.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcmr.simulations.patients.heart import Patient, extent_mm
from fedcmr.simulations.patients.torso import render_torso
from fedcmr.simulations.scanners.contrast import TISSUES, bssfp_signal
from fedcmr.simulations.scanners.receive_chain import ReceiveFields, k_space_window, receive
from fedcmr.simulations.scanners.rendering import render_heart

Float = NDArray[np.floating]


@dataclass(frozen=True)
class Scanner:
    """One site's scanner and cine protocol; pairs are uniform ranges from patient to patient.

    Attributes:
        manufacturer: Manufacturer (0008,0070); likewise `model`, `software`, `receive_coil`, `sequence_name`.
        echo_spacing_ms: Interval between excitations, TR of the steady state.
        shape: Rows and columns of the image.
        sampled: Part of rows and columns of k-space that is sampled; the rest is zero-filled.
        apodisation: 0 none (ringing) to 1 a full Hann window (soft).
        spacing_mm: Between slice centres; widened where the requested number of slices would not cover the heart.
        snr: Signal-to-noise ratio of LV blood in an image at the field's centre, lowest and highest.
        g_factor: Noise amplification by parallel imaging at the body's centre.
        shading: Part of the coils' shading that the vendor's correction leaves, as an exponent.
        max_intensity: Brightest stored value of a stack.
        turn_deg: In-plane turn of the image against the heart's axes.
        apex_first: Slice order of the vendor's stack.
        phase_major: Whether InstanceNumber runs over slices within a phase, not over phases within a slice.
    """

    manufacturer: str
    model: str
    software: str
    receive_coil: str
    sequence_name: str
    series_description: str
    field_strength_t: float
    flip_angle_deg: tuple[float, float]
    echo_spacing_ms: tuple[float, float]
    shape: tuple[int, int]
    sampled: tuple[float, float]
    apodisation: float
    pixel_mm: tuple[float, float]
    thickness_mm: float
    spacing_mm: tuple[float, float]
    snr: tuple[float, float]
    g_factor: float
    shading: tuple[float, float]
    max_intensity: tuple[float, float]
    turn_deg: tuple[float, float]
    apex_first: bool
    phase_major: bool


SCANNERS: dict[str, Scanner] = {
    "Siemens": Scanner(
        manufacturer="SIEMENS",
        model="Avanto",
        software="syngo MR B17",
        receive_coil="Body_6",
        sequence_name="*tfi2d1_15",
        series_description="cine_tf2d15_retro_iPAT_sax",
        field_strength_t=1.5,
        flip_angle_deg=(62, 80),
        echo_spacing_ms=(2.7, 3.1),
        shape=(256, 208),
        sampled=(0.78, 0.92),
        apodisation=0.35,
        pixel_mm=(1.30, 1.42),
        thickness_mm=8.0,
        spacing_mm=(9.2, 10.0),
        snr=(35, 60),
        g_factor=1.3,
        shading=(0.35, 0.75),
        max_intensity=(900, 1300),
        turn_deg=(-62, -28),
        apex_first=False,
        phase_major=False,
    ),
    "Philips": Scanner(
        manufacturer="Philips Medical Systems",
        model="Achieva",
        software="5.3.1",
        receive_coil="SENSE-XL-Torso",
        sequence_name="B-FFE",
        series_description="sBTFE_BH_SA_multi",
        field_strength_t=3.0,
        flip_angle_deg=(38, 48),
        echo_spacing_ms=(2.6, 3.0),
        shape=(288, 288),
        sampled=(0.62, 0.68),
        apodisation=0.0,
        pixel_mm=(1.18, 1.30),
        thickness_mm=8.0,
        spacing_mm=(8.0, 10.0),
        snr=(35, 55),
        g_factor=1.7,
        shading=(0.10, 0.30),
        max_intensity=(330, 420),
        turn_deg=(-85, -60),
        apex_first=True,
        phase_major=True,
    ),
    "GE": Scanner(
        manufacturer="GE MEDICAL SYSTEMS",
        model="Signa HDxt",
        software="HD16.0_V02_1131.a",
        receive_coil="8US TORSOPA",
        sequence_name="fiesta",
        series_description="SAX FIESTA CINE",
        field_strength_t=1.5,
        flip_angle_deg=(45, 60),
        echo_spacing_ms=(3.3, 4.0),
        shape=(256, 256),
        sampled=(0.72, 0.80),
        apodisation=0.7,
        pixel_mm=(1.40, 1.56),
        thickness_mm=8.0,
        spacing_mm=(9.5, 10.0),
        snr=(26, 40),
        g_factor=1.2,
        shading=(0.7, 1.0),
        max_intensity=(2500, 3300),
        turn_deg=(-10, 12),
        apex_first=False,
        phase_major=False,
    ),
}


@dataclass(frozen=True)
class Stack:
    """Where a stack of slices lies, in LPS millimetres.

    Attributes:
        first_pixel_mm: Centre of each slice's first pixel, shape (Z, 3), base to apex.
        row_direction: Unit vector along a row (first half of ImageOrientationPatient).
        column_direction: Unit vector down a column (second half).
        pixel_mm: Side of a pixel.
        spacing_mm: Between slice centres.
        thickness_mm: Thickness of a slice.
    """

    first_pixel_mm: NDArray[np.float64]
    row_direction: NDArray[np.float64]
    column_direction: NDArray[np.float64]
    pixel_mm: float
    spacing_mm: float
    thickness_mm: float

    def affine_lps(self) -> NDArray[np.float64]:
        """From array index (column, row, slice from the base) to LPS mm, shape (4, 4)."""
        affine = np.eye(4)
        affine[:3, 0] = self.row_direction * self.pixel_mm
        affine[:3, 1] = self.column_direction * self.pixel_mm
        affine[:3, 2] = (self.first_pixel_mm[-1] - self.first_pixel_mm[0]) / (len(self.first_pixel_mm) - 1)
        affine[:3, 3] = self.first_pixel_mm[0]
        return affine


@dataclass(frozen=True)
class Acquisition:
    """One patient's cine stack.

    Attributes:
        frames: Stored values, uint16 (T, Z, H, W), slices from base to apex.
        masks: uint8 (T, Z, H, W): 0 background, 1 RV, 2 myocardium, 3 LV cavity.
        trigger_time_ms: After the R wave, shape (T,).
        flip_angle_deg: Excitation angle of this scan.
        echo_spacing_ms: Interval between excitations.
        interval_ms: RR interval.
    """

    frames: NDArray[np.uint16]
    masks: NDArray[np.uint8]
    stack: Stack
    trigger_time_ms: NDArray[np.float64]
    flip_angle_deg: float
    echo_spacing_ms: float
    interval_ms: float


def acquire(
    patient: Patient, scanner: Scanner, num_slices: int, num_phases: int, rng: np.random.Generator
) -> Acquisition:
    """Scan a patient: a short-axis stack from the mitral plane to the apex, `num_phases` over one RR interval."""
    echo_spacing_ms, flip_angle_deg = rng.uniform(*scanner.echo_spacing_ms), rng.uniform(*scanner.flip_angle_deg)
    tissues = TISSUES[scanner.field_strength_t]
    signal = {name: float(bssfp_signal(t, echo_spacing_ms, flip_angle_deg)) for name, t in tissues.items()}
    signal = {name: value * rng.normal(1, 0.04) for name, value in signal.items()}
    inflow = rng.uniform(0.95, 1.15)  # fresh, unsaturated blood
    signal["blood"], signal["venous blood"] = signal["blood"] * inflow, signal["venous blood"] * inflow
    signal["fat"] *= -1  # opposed phase at TE = TR / 2, see `render_heart`
    stack = _plan(patient, scanner, num_slices, rng)
    interval_ms = 60e3 / patient.heart_rate_bpm
    time = np.arange(num_phases) / num_phases

    heart = patient.rotation
    shape = scanner.shape
    down, right = (np.arange(size, dtype=np.float32) * np.float32(stack.pixel_mm) for size in shape)
    window = k_space_window(shape, scanner.sampled, scanner.apodisation)
    noise_level = np.float32(signal["blood"] / rng.uniform(*scanner.snr))
    shading = rng.uniform(*scanner.shading)
    fields = ReceiveFields(patient, scanner.field_strength_t, shading, scanner.g_factor, rng)
    frames = np.empty((num_phases, num_slices, *shape), np.float32)
    masks = np.zeros(frames.shape, np.uint8)
    for z, origin in enumerate(stack.first_pixel_mm):
        shift = heart.T @ rng.normal(0, [1.0, 1.5, 1.0])  # the breath is held a little differently each time
        points = _grid(origin - shift, stack.column_direction, stack.row_direction, down, right)
        surroundings = render_torso(patient, points, signal, stack.pixel_mm)
        start, along, across = (heart @ v for v in (origin - shift, stack.column_direction, stack.row_direction))
        x_mm, y_mm, _ = np.moveaxis(_grid(start, along, across, down, right), -1, 0)
        patch = _patch(patient, x_mm, y_mm)
        thirds = start[2] + stack.thickness_mm * np.array([-1, 0, 1]) / 3
        rendered, mask = render_heart(
            patient, x_mm[patch], y_mm[patch], thirds, time, surroundings[patch], signal, stack.pixel_mm, rng
        )
        scene = np.repeat(surroundings[None], num_phases, 0)
        scene[:, *patch], masks[:, z, *patch] = rendered, mask
        received, correction, noise_gain = fields.at(points, echo_spacing_ms, tissues["muscle"], flip_angle_deg)
        frames[:, z] = correction * receive(scene * received, window, noise_level * noise_gain, rng)
    frames *= rng.uniform(*scanner.max_intensity) / frames.max()
    return Acquisition(
        frames=np.rint(frames).astype(np.uint16),
        masks=masks,
        stack=stack,
        trigger_time_ms=time * interval_ms,
        flip_angle_deg=flip_angle_deg,
        echo_spacing_ms=echo_spacing_ms,
        interval_ms=interval_ms,
    )


def _plan(patient: Patient, scanner: Scanner, num_slices: int, rng: np.random.Generator) -> Stack:
    """The technologist's planning: first slice below the mitral plane, heart in the field of view's middle third."""
    x, y, z = patient.rotation
    turn = np.radians(rng.uniform(*scanner.turn_deg))
    row_direction, column_direction = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    pixel_mm = round(rng.uniform(*scanner.pixel_mm), 4)
    top = patient.length_mm / 2 - rng.uniform(3, 13)
    spacing_mm = round(max(rng.uniform(*scanner.spacing_mm), (top + patient.length_mm / 2) / (num_slices - 0.7)), 1)
    centre = x * rng.normal(0, 8) + y * rng.normal(10, 8)
    levels = top - spacing_mm * np.arange(num_slices)
    half = (np.array(scanner.shape) - 1) / 2 * pixel_mm
    first = centre - column_direction * half[0] - row_direction * half[1] + z * levels[:, None]
    thickness_mm = min(scanner.thickness_mm, spacing_mm)
    return Stack(first, row_direction, column_direction, pixel_mm, spacing_mm, thickness_mm)


def _grid(
    start: NDArray[np.float64], along: NDArray[np.float64], across: NDArray[np.float64], down: Float, right: Float
) -> Float:
    """Positions `start + down x along + right x across` of all pixels, shape (H, W, 3)."""
    grid = start + down[:, None, None] * along + right[:, None] * across
    return grid.astype(np.float32)


def _patch(patient: Patient, x_mm: Float, y_mm: Float) -> tuple[slice, slice]:
    """Rows and columns that hold the heart."""
    to_rv, around = extent_mm(patient)
    held = (x_mm > -to_rv) & (x_mm < around) & (np.abs(y_mm) < max(around, 0.75 * to_rv))
    rows, cols = np.flatnonzero(held.any(1)), np.flatnonzero(held.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)

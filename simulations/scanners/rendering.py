"""How a slice of the beating heart is rendered over its surroundings, with partial volume in plane and through it.

Modelled: compact and trabeculated myocardium, papillary muscles (both count as cavity in the masks, as readers of ACDC
and M&Ms count them), unevenly bright blood, thin-walled RV with its own trabeculae, epicardial fat, the aortic root
between the atria. Not modelled: valve leaflets, coronary arteries, flow voids and jets.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fedcmr.shared.case import LV, MYO, RV
from fedcmr.simulations.patients.heart import ANGLES, NUM_ANGLES, RV_WALL_MM, Contours, Patient, contours, scar_weight

Float = NDArray[np.floating]

AORTA_MM = 13.5  # radius of the aortic root
MAX_RELIEF = 2.5
CLOSING = 1.3  # of the relief, per shortening of the circumference: keeps the trabeculae's volume within a fifth
FLOW_STEP = 14  # pixels between the knots of the blood's unevenness


def render_heart(
    patient: Patient,
    x_mm: Float,
    y_mm: Float,
    z_mm: NDArray[np.floating],
    time: NDArray[np.floating],
    background: Float,
    signal: Mapping[str, float],
    pixel_mm: float,
    rng: np.random.Generator,
) -> tuple[Float, NDArray[np.uint8]]:
    """Render one slice of the heart at several times over what surrounds it.

    In-plane partial volume is the covered part of each pixel (exact for a straight border); through-plane partial
    volume is the mean over the levels `z_mm`.

    Args:
        patient: Whose heart.
        x_mm: Heart coordinate x of the pixels, shape (H, W).
        y_mm: Heart coordinate y, shape (H, W).
        z_mm: Levels within the slice's thickness, shape (S,).
        time: Fractions of the RR interval, shape (T,).
        background: Signal of the surroundings, shape (H, W).
        signal: Signed magnetisation per tissue name; fat is negative (opposed phase), so that it cancels against
            water in shared pixels, the black border of balanced SSFP.
        pixel_mm: Side of a pixel.
        rng: Draws the unevenness of flowing blood, which differs from phase to phase.

    Returns:
        Frames (T, H, W) and masks (T, H, W): 0 background, 1 RV, 2 myocardium, 3 LV cavity, by largest share.
    """
    lines = contours(patient, z_mm, time)
    frames = np.zeros((len(time), *background.shape), np.float32)
    shares = np.zeros((4, *frames.shape), np.float32)
    relief = _relief(patient, x_mm, y_mm, float(np.mean(z_mm)), pixel_mm)
    speckle = np.clip(relief, 0, MAX_RELIEF)
    knots = [-(-size // FLOW_STEP) + 1 for size in background.shape]
    flow = 1 + 0.06 * enlarge(rng.standard_normal((len(time), *knots), dtype=np.float32), background.shape, FLOW_STEP)
    for s, z in enumerate(np.asarray(z_mm, np.float32)):
        bend = (z / patient.length_mm - 0.5) ** 2
        x, y = x_mm - patient.axis_bend_mm[0] * bend, y_mm - patient.axis_bend_mm[1] * bend
        level, rv_level = lines.level[:, s, :, None], lines.rv_level[:, s, :, None]
        r, angle = _polar(x, y)
        towards_rv = np.pi + patient.rv_tilt
        u = x * np.cos(towards_rv) + y * np.sin(towards_rv) - lines.rv_centre_mm[s]
        v = -x * np.sin(towards_rv) + y * np.cos(towards_rv)
        r_rv, angle_rv = _polar(u, v)
        apical = float(np.clip(level.mean(), 0, 1))
        # Trabeculae keep their volume: as the cavity shrinks they close up until the rim is dark all around.
        outline = lines.endo[:, s].mean(1)
        crowded = (outline.max() / np.maximum(outline, 1.0))[:, None, None]
        closed_up = np.clip(relief + CLOSING * (crowded - 1), 0, MAX_RELIEF)
        ragged = r + patient.trabeculae_mm * (0.5 + apical) * (closed_up + 0.15)
        ragged_rv = r_rv + (2.0 + 3.5 * apical) * speckle

        rv_line = lines.rv[:, s].take(angle_rv, axis=1)
        epi_line = lines.epi[:, s].take(angle, axis=1)
        endo_line = lines.endo[:, s].take(angle, axis=1)
        fat_line = lines.fat[:, s].take(angle, axis=1)
        in_rv, in_epi, in_endo = (
            _covered(line, radius, pixel_mm) for line, radius in ((rv_line, r_rv), (epi_line, r), (endo_line, r))
        )
        has_rv = rv_line > 0
        value = background[None].repeat(len(time), 0)
        uneven = 0.7 + 0.6 * apical + 0.6 * np.cos(2 * ANGLES[angle_rv] + 2 * apical)
        rv_fat = RV_WALL_MM + patient.fat_mm * np.maximum(uneven, 0)
        _over(value, _covered(fat_line, r, pixel_mm), signal["fat"])
        _over(value, _covered(rv_line + rv_fat, r_rv, pixel_mm) * has_rv, signal["fat"])
        _over(value, _covered(rv_line + RV_WALL_MM, r_rv, pixel_mm) * has_rv, signal["myocardium"])
        spongy = 1 - (0.1 + 0.35 * apical) * np.minimum(speckle, 1)
        _over(value, spongy * _covered(rv_line, ragged_rv, pixel_mm), signal["venous blood"] * flow)
        scar = scar_weight(patient, level[..., 0]).take(angle, axis=1) if patient.scar[0] > 0 else 0.0
        _over(value, in_epi, signal["myocardium"] + scar * (signal["scar"] - signal["myocardium"]))
        blood = in_endo * (0.15 + 0.85 * _covered(endo_line, ragged, pixel_mm))
        blood = np.where(level > 0, blood * (1 - _papillary(patient, x, y, speckle, lines, s, pixel_mm)), in_endo)
        _over(value, blood, signal["blood"] * flow)
        in_aorta = _aortic_root(value, x, y, lines.endo[:, s].mean(1), level, signal, pixel_mm)
        frames += value
        in_ventricle, in_right = (level >= 0) & (level < 1), (rv_level >= 0) & (rv_level < 1)
        shares[LV] += in_endo * in_ventricle
        shares[MYO] += (in_epi - in_endo) * (level >= 0)
        shares[RV] += in_rv * (1 - in_epi) * (1 - in_aorta) * in_right
    shares[0] = len(z_mm) - shares[1:].sum(0)
    return frames / len(z_mm), shares.argmax(0).astype(np.uint8)


def enlarge(coarse: Float, shape: tuple[int, int], step: int) -> Float:
    """Linear interpolation of values at every `step`-th pixel, (..., h, w), to all pixels of `shape`."""
    for axis, size in ((-2, shape[0]), (-1, shape[1])):
        position = np.minimum(np.arange(size, dtype=np.float32) / step, coarse.shape[axis] - 1)
        before = np.minimum(position.astype(np.intp), max(coarse.shape[axis] - 2, 0))
        after = np.minimum(before + 1, coarse.shape[axis] - 1)
        part = (position - before).reshape((-1, 1) if axis == -2 else -1)
        coarse = coarse.take(before, axis) * (1 - part) + coarse.take(after, axis) * part
    return coarse.astype(np.float32, copy=False)


def _papillary(patient: Patient, x: Float, y: Float, speckle: Float, lines: Contours, s: int, pixel_mm: float) -> Float:
    """Share of each pixel covered by a papillary muscle, shape (T, H, W)."""
    level, endo = lines.level[:, s, 0], lines.endo[:, s]
    covered = np.zeros((len(level), *x.shape), np.float32)
    for angle, distance, size in patient.papillary:
        radius = size * np.sqrt(np.clip(1 - ((level - 0.52) / 0.3) ** 2, 0, 1))
        if not radius.any():
            continue
        away = distance * endo[:, int(np.degrees(angle)) % NUM_ANGLES]
        dx = x - (away * np.cos(angle))[:, None, None]
        dy = y - (away * np.sin(angle))[:, None, None]
        border = np.where(radius > 0, radius, -np.inf)[:, None, None]
        np.maximum(covered, _covered(border, np.sqrt(dx * dx + dy * dy) - speckle, pixel_mm), out=covered)
    return covered


def _aortic_root(
    value: Float, x: Float, y: Float, radius: Float, level: Float, signal: Mapping[str, float], pixel_mm: float
) -> Float:
    """Render the aortic root between the atria when the slice lies above the mitral plane; return what it covers."""
    away = 0.95 * radius[:, None, None]
    distance = np.hypot(x + away * 0.75, y + away * 0.66)
    above = level < -0.06
    covered = _covered(AORTA_MM + 1.5, distance, pixel_mm) * above
    _over(value, covered, signal["myocardium"])
    _over(value, _covered(AORTA_MM, distance, pixel_mm) * above, signal["blood"])
    return covered


def _relief(patient: Patient, x: Float, y: Float, z: float, pixel_mm: float) -> Float:
    """Standard-normal field, about 2.5 mm fine, the same at every time of a slice; where positive, trabeculae stand."""
    rng = np.random.default_rng([patient.texture_seed, int(1000 + z)])
    noise = gaussian_filter(rng.standard_normal(x.shape, dtype=np.float32), 1.8 / pixel_mm)
    return noise / noise.std()


def _polar(x: Float, y: Float) -> tuple[Float, NDArray[np.intp]]:
    """Radius and index into `ANGLES`."""
    angle = np.arctan2(y, x) * np.float32(NUM_ANGLES / (2 * np.pi))
    return np.hypot(x, y), np.rint(angle).astype(np.intp) % NUM_ANGLES


def _covered(border: float | Float, radius: Float, pixel_mm: float) -> Float:
    """Share of a pixel within the border."""
    return np.clip((border - radius) / np.float32(pixel_mm) + np.float32(0.5), 0, 1)


def _over(value: Float, covered: Float, signal: float | Float) -> None:
    """Render a tissue over what is there, in place."""
    value += covered * (signal - value)

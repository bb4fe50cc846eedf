"""A beating heart: one patient's anatomy and, from it, the chambers' contours at any level and time.

Heart coordinates, mm, right-handed: x from septum to lateral wall, y from anterior to inferior wall, z from apex to
base; the origin is the middle of the ventricle's long axis at end-diastole. Angles are `atan2(y, x)`, so 0 is lateral,
+90 degrees inferior, 180 septal, -90 anterior. All contours are star-shaped around the axis of their chamber and are
kept as radius profiles over the angle; time is the fraction of the RR interval after the R wave.

Modelled: LV cavity, myocardium of incompressible volume, so that the wall thickens as the cavity shrinks, RV with a
thin wall, epicardial fat, mitral and tricuspid planes that move toward the apex, atria above them, scars that neither
thicken nor move. Not modelled: torsion, electrical dyssynchrony, pericardial effusion, diastolic dysfunction.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

GroupName = Literal["normal", "dilated", "hypertrophic", "infarcted", "rv_dilated"]
Float = NDArray[np.floating]

NUM_ANGLES = 360
ANGLES = np.arange(NUM_ANGLES, dtype=np.float32) * np.float32(2 * np.pi / NUM_ANGLES)
WIDEST_LEVEL = 0.3  # where between mitral plane (0) and apex (1) the ventricle is widest
APICAL_GAIN = 0.35
"""The apex closes further than the base, as strain does: the change in area is as even along the axis as in ACDC."""
RV_WALL_MM = 3.0
ATRIAL_WALL_MM = 2.5
ATRIAL_NECK_MM = 13.0  # way over which ventricle turns into atrium


@dataclass(frozen=True, eq=False)
class Patient:
    """Anatomy of one patient; no image. Lengths in mm, angles in radians, fractions in [0, 1].

    Attributes:
        ef: Ejection fraction of the smooth model; that of the masks differs by slicing, by a few points.
        radius_mm: Largest endocardial radius at end-diastole.
        contraction: Part of the endocardial radius lost at end-systole where the wall is healthy.
        shape: (2, 4) amplitude and phase of the endocardial contour's harmonics 2 to 5.
        septal_flattening: Part of the radius missing at the septum (pressure or volume load of the RV).
        thickening: Extra wall (mm), its angle and angular width (hypertrophy).
        scar: Severity, angle, angular width and level (0 base, 1 apex) of an infarct; severity 0 without one.
        mapse_mm: The mitral plane's way toward the apex.
        tapse_mm: The tricuspid plane's way toward the apex.
        rv_shape: (2, 3) amplitude and phase of the RV contour's harmonics 2 to 4.
        papillary: (4, 3) angle, distance from the axis over the cavity's radius, radius in mm.
        axis_bend_mm: x and y by which the apex lies off the straight axis.
        es_time: End-systole after the R wave, fraction of the RR interval.
        rotation: Heart axes as rows (x, y, z), in the patient's LPS coordinates; see `torso.py` for what surrounds it.
        texture_seed: Seeds trabeculae, vessels and fat lobules, so that every phase shows the same ones.
    """

    group: GroupName
    sex: Literal["F", "M"]
    age_years: int
    height_m: float
    weight_kg: float
    heart_rate_bpm: float
    ef: float
    radius_mm: float
    length_mm: float
    wall_mm: float
    apical_wall_mm: float
    contraction: float
    shape: Float
    septal_flattening: float
    thickening: tuple[float, float, float]
    scar: tuple[float, float, float, float]
    mapse_mm: float
    rv_width_mm: float
    rv_shortening: float
    rv_insertion: float
    rv_tilt: float
    rv_base_mm: float
    rv_shape: Float
    tapse_mm: float
    papillary: Float
    trabeculae_mm: float
    fat_mm: float
    subcutaneous_mm: float
    axis_bend_mm: tuple[float, float]
    es_time: float
    rotation: Float
    texture_seed: int


def activation(patient: Patient, time: NDArray[np.floating]) -> Float:
    """Contraction over the RR interval: 0 at end-diastole, 1 at end-systole.

    Ejection, a short isovolumic plateau, rapid filling to 15 %, diastasis, and the atrial kick back to 0 at time 1.
    """
    end = patient.es_time
    knots = np.array([0.0, 0.03, 0.45 * end, end, end + 0.08, end + 0.28, 0.85, 1.0])
    values = np.array([0.0, 0.0, 0.55, 1.0, 1.0, 0.15, 0.12, 0.0])
    return np.interp(np.mod(time, 1.0), knots, values).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Contours:
    """Radius profiles at some times and levels; shapes (time, level, angle) and (time, level, 1).

    Attributes:
        endo: LV cavity's outline around the LV axis.
        epi: Outer border of the LV wall, likewise.
        fat: Outer border of the epicardial fat, likewise.
        rv: RV cavity's outline, around `rv_centre_mm`.
        rv_centre_mm: Distance of the RV's centre from the LV axis, shape (level,), constant in time.
        level: 0 at the mitral plane, 1 at the endocardial apex.
        rv_level: 0 at the tricuspid plane, 1 at the RV apex.
    """

    endo: Float
    epi: Float
    fat: Float
    rv: Float
    rv_centre_mm: Float
    level: Float
    rv_level: Float


def contours(patient: Patient, z_mm: NDArray[np.floating], time: NDArray[np.floating]) -> Contours:
    """All contours at the levels `z_mm` (Z,) and the times (T,)."""
    active = activation(patient, time)[:, None, None]
    z = np.asarray(z_mm, np.float32)[None, :, None]
    length = patient.length_mm - patient.mapse_mm * active
    level = (patient.length_mm / 2 - patient.mapse_mm * active - z) / length
    endo_ed, epi_ed, motion = _relaxed_wall(patient, level)
    endo = endo_ed * (1 - patient.contraction * motion * active)
    # Incompressible muscle has exponent 1: its cross-section grows as the ventricle shortens. Trabeculae that close up
    # against it add to what a reader outlines.
    epi = np.sqrt(endo**2 + (epi_ed**2 - endo_ed**2) * (patient.length_mm / length) ** 1.6)
    rv, rv_centre, rv_level = _right_ventricle(patient, z, active, epi)
    grooves = sum(np.exp(-((_turn(ANGLES - angle) / 0.35) ** 2)) for angle in (np.pi + 1.15, np.pi - 1.15))
    fat = epi + patient.fat_mm * (0.1 + grooves + 2 * np.clip(level - 0.8, 0, 0.4) + 0.8 * (level < 0.1)) * (epi > 0)
    # Above the mitral plane the ring narrows into the atrium, and the fat of the groove takes its place.
    above = np.clip(-level * length / ATRIAL_NECK_MM, 0, 1)
    atrial = endo_ed * (0.84 + 0.14 * np.cos(ANGLES - np.pi / 4) + 0.1 * active)
    wall = (epi - endo) * (1 - above)
    endo = endo + above * (atrial - endo)
    epi = np.where(level < 0, endo + np.maximum(wall, ATRIAL_WALL_MM), epi)
    fat = np.maximum(fat * (1 - 0.25 * above), epi)
    return Contours(*(np.asarray(a, np.float32) for a in (endo, epi, fat, rv, rv_centre, level, rv_level)))


def extent_mm(patient: Patient) -> tuple[float, float]:
    """How far the heart and its fat reach in plane from the LV axis: toward the RV, and elsewhere."""
    epi = patient.radius_mm * 1.08 + patient.wall_mm + patient.thickening[0]
    fat = 2.5 * patient.fat_mm + RV_WALL_MM + 4
    return epi + patient.rv_width_mm + fat, 1.25 * epi + fat


def with_volume(patient: Patient, edv_ml: float) -> Patient:
    """Set radius and contraction so that the smooth model has this volume and the patient's ejection fraction.

    With endocardial radius R (1 - k m), m the local motion, and length L: EF = 1 - L_es/L_ed sum R^2 (1 - k m)^2 /
    sum R^2, a quadratic equation in k.
    """
    level = ((np.arange(64, dtype=np.float32) + 0.5) / 64)[None, :, None]
    endo, _, motion = _relaxed_wall(patient, level)
    area = (endo / patient.radius_mm) ** 2
    radius = np.sqrt(edv_ml * 1e3 / (np.pi * patient.length_mm * area.mean()))
    shorter = 1 - patient.mapse_mm / patient.length_mm
    a, b, c = (float((area * motion**power).mean() / area.mean()) for power in (2, 1, 0))
    target = (1 - patient.ef) / shorter
    k = (b - np.sqrt(max(b * b - a * (c - target), 0.0))) / a
    return replace(patient, radius_mm=float(radius), contraction=float(np.clip(k, 0.02, 0.85)))


def scar_weight(patient: Patient, level: Float) -> Float:
    """1 in the middle of the infarcted territory, 0 away from it; shape of `level` broadcast with the angles."""
    severity, angle, width, centre = patient.scar
    if severity == 0:
        return np.zeros(np.broadcast_shapes(level.shape, ANGLES.shape), np.float32)
    across = np.clip(1.6 - np.abs(_turn(ANGLES - angle)) / width, 0, 1)
    along = np.clip(1.5 - np.abs(level - centre) / 0.35, 0, 1)
    return across * along


def _relaxed_wall(patient: Patient, level: Float) -> tuple[Float, Float, Float]:
    """End-diastolic endocardial and epicardial radius, and the local motion (1 healthy, 0 still)."""
    amplitude, phase = patient.shape
    orders = np.arange(2, 6, dtype=np.float32)
    outline = 1 + (amplitude[:, None] * np.cos(orders[:, None] * ANGLES + phase[:, None])).sum(0)
    outline = outline - patient.septal_flattening * np.exp(-((_turn(ANGLES - np.pi) / 0.75) ** 2))
    scarred = scar_weight(patient, level)
    bump, angle, width = patient.thickening
    wall = patient.wall_mm * (1 - 0.3 * np.clip(level, 0, 1)) * (1 - 0.45 * scarred)
    wall = wall + bump * np.exp(-((_turn(ANGLES - angle) / width) ** 2)) * np.exp(-(((level - 0.35) / 0.45) ** 2))
    endo = patient.radius_mm * outline * _taper(level, 1.0)
    epi = (patient.radius_mm * outline + wall) * _taper(level, 1 + patient.apical_wall_mm / patient.length_mm)
    motion = (1 + APICAL_GAIN * (np.clip(level, 0, 1) - WIDEST_LEVEL)) * (1 - patient.scar[0] * scarred)
    return endo, np.maximum(epi, endo), motion


def _taper(level: Float, apex: float) -> Float:
    """Radius over the largest radius: a half-ellipsoid toward the apex, slightly narrower toward the mitral plane."""
    below = np.clip((level - WIDEST_LEVEL) / (apex - WIDEST_LEVEL), 0, 1)
    above = np.clip((WIDEST_LEVEL - level) / WIDEST_LEVEL, 0, 1.6)
    return np.sqrt(1 - below**2.2) * (1 - 0.1 * above**2)


def _right_ventricle(patient: Patient, z: Float, active: Float, epi: Float) -> tuple[Float, Float, Float]:
    """RV outline around a fixed centre: an ellipse that enters the LV wall at the two insertion points."""
    top = patient.length_mm / 2 + patient.rv_base_mm
    apex = -0.42 * patient.length_mm
    level = (top - patient.tapse_mm * active - z) / (top - patient.tapse_mm * active - apex)
    width = patient.rv_width_mm * np.sqrt(np.clip(1 - np.clip((level - 0.1) / 0.9, 0, 1) ** 2.1, 0, 1))
    width = width * (1 - patient.rv_shortening * active * np.clip(0.5 + 4 * level, 0, 1))
    septal = np.abs(_turn(ANGLES - np.pi - patient.rv_tilt)) < 0.8
    wall = np.maximum(epi[..., septal].mean(-1, keepdims=True), 1.0)
    near, far = 0.1 * wall, wall + width
    a, centre = np.maximum((far - near) / 2, 1.0), (far + near) / 2
    insertion = patient.rv_insertion * (1 - 0.25 * np.clip(level, 0, 1))
    b = wall * np.sin(insertion) / np.sqrt(np.clip(1 - ((wall * np.cos(insertion) - centre) / a) ** 2, 0.05, 1))
    reference = centre[0, :, 0]
    shift = centre - reference[None, :, None]
    cos, sin = np.cos(ANGLES), np.sin(ANGLES)
    p, q = (cos / a) ** 2 + (sin / b) ** 2, -cos * shift / a**2
    rv = (-q + np.sqrt(np.maximum(q**2 - p * ((shift / a) ** 2 - 1), 0))) / p
    amplitude, phase = patient.rv_shape
    orders = np.arange(2, 5, dtype=np.float32)
    rv = rv * (1 + (amplitude[:, None] * np.cos(orders[:, None] * ANGLES + phase[:, None])).sum(0))
    return rv * (width > 1.0), reference, level


def _turn(angle: Float) -> Float:
    """The same angle in [-pi, pi)."""
    return np.mod(angle + np.pi, 2 * np.pi) - np.pi

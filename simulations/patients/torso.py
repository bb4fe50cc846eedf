"""What surrounds the heart: a still torso in the patient's LPS coordinates, mm, origin at the middle of the LV axis.

Modelled: an elliptical trunk with subcutaneous fat, muscle, ribs, vertebral column, lungs with vessels, a sloping
diaphragm with liver, hepatic vessels, stomach and spleen under it, mediastinal fat, descending aorta and vena cava.
Not modelled: arms, breasts, bowel gas and its susceptibility, pleural effusion, breathing, anything that pulsates.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

from fedcmr.simulations.patients.heart import Patient
from fedcmr.simulations.scanners.rendering import enlarge

Float = NDArray[np.floating]

MUSCLE_MM = 14.0
TEXTURE_SIZE = 40


def render_torso(patient: Patient, points_mm: Float, signal: Mapping[str, float], pixel_mm: float) -> Float:
    """Render a slice of the torso.

    Args:
        patient: Size of the heart, fat and texture.
        points_mm: LPS coordinates of the pixels, shape (H, W, 3).
        signal: Signed magnetisation per tissue name.
        pixel_mm: Side of a pixel; borders are blurred over it, as partial volume does.

    Returns:
        Shape (H, W).
    """
    left, back, up = np.moveaxis(points_mm, -1, 0)
    wavy, coarse, fine = (_texture(patient, points_mm, *scale) for scale in ((45.0, 8), (11.0, 4), (3.5, 1)))
    vary = np.random.default_rng([patient.texture_seed, 1]).uniform(-1, 1, 12).astype(np.float32)

    def inside(depth_mm: Float) -> Float:
        """Share of a pixel that lies deeper than a surface."""
        return np.clip(depth_mm / pixel_mm + 0.5, 0, 1)

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Float:
        """Depth below an ellipsoid's surface, roughly in mm; an infinite radius makes it a cylinder."""
        offsets = [(axis - c) / r for axis, c, r in zip((left, back, up), centre, radii, strict=True)]
        return (1 - np.sqrt(sum(o * o for o in offsets))) * min(radii)

    front = 0.79 * (patient.radius_mm + patient.wall_mm + patient.rv_width_mm) + 3
    depth_ap = (front + 105 + 6 * vary[0]) / 2  # chest cavity: from the sternum to behind the vertebrae
    middle = depth_ap - front
    half_width = 110 + 8 * vary[1] + 0.9 * (patient.weight_kg / patient.height_m**2 - 25)
    cavity = ellipsoid((-36, middle, 0), (half_width, depth_ap, np.inf))
    muscle = MUSCLE_MM + 26 * np.exp(-(((left + 36) / 50) ** 2)) * (back > middle) + 3 * wavy
    fat = patient.subcutaneous_mm * (1 + 0.35 * np.cos(left / 60 + vary[2]) + 0.2 * wavy)

    value = np.zeros(left.shape, np.float32)

    def over(share: Float, tissue: str, factor: float | Float = 1.0) -> None:
        value[...] += share * (signal[tissue] * factor - value)

    body = inside(cavity + muscle + fat)
    over(body, "muscle")
    over(inside(cavity + muscle + fat - 1.5), "fat", 1 + 0.05 * fine)
    over(inside(cavity + muscle), "muscle", 1 + 0.1 * fine)
    fascia = np.clip(1 - np.abs(cavity + 0.45 * muscle + 2 * wavy) / 2.5, 0, 1)
    over(0.8 * fascia * inside(cavity + muscle), "fat")
    rib = np.sin(2 * np.pi * (up + 0.45 * np.abs(left + 36) - 0.3 * back) / 27) - 0.45
    in_wall = inside(cavity + 10) * (1 - inside(cavity + 1))
    over(in_wall * np.clip(4 * rib + 1, 0, 1), "lung")  # cortical bone is as dark as air
    over(in_wall * np.clip(4 * rib, 0, 1), "marrow")
    chest = inside(cavity)
    over(chest, "lung", 1 + 0.3 * coarse)
    vessels = np.clip(2.5 * (fine + 0.35 * coarse - 1.6), 0, 1)
    over(chest * vessels * np.exp(-((np.hypot(left - 10, back - 10) / 80) ** 2)), "venous blood")

    mediastinum = chest * inside(ellipsoid((-32, 34, 20), (32 + 6 * vary[3], 34, 95)) + 5 * wavy + 2 * coarse)
    over(mediastinum, "fat", 0.9)
    over(mediastinum * np.clip(0.6 * (coarse + 0.2), 0, 1), "muscle")

    fat_pad = ellipsoid((8, float(8 - front), -30), (58, 24 + patient.fat_mm, 40))
    over(chest * inside(fat_pad + 5 * wavy), "fat", 0.9 + 0.05 * fine)

    beneath = 0.9 * (patient.radius_mm + patient.wall_mm) + 2 + 3 * vary[4]
    floor = up + beneath + 0.42 * (left - 5) + 0.10 * back + ((left + 10) / 95) ** 2 * 14
    abdomen, deeper = chest * inside(2 * wavy - floor), chest * inside(2 * wavy - floor - 3)
    over(abdomen, "muscle")
    over(deeper, "fat", 1 + 0.06 * fine)
    over(deeper * np.clip(2 * (coarse - 0.3), 0, 1), "muscle")  # bowel and its wall between the fat
    liver = deeper * inside(30 + 16 * vary[5] - left - 0.25 * back + 6 * wavy)
    over(liver, "liver", 1 + 0.05 * fine)
    over(liver * np.clip(2.5 * (coarse + 0.3 * fine - 1.5), 0, 1), "venous blood")
    stomach = ellipsoid((56 + 14 * vary[6], -2, float(-84 + 12 * vary[7])), (40, 46, 44)) + 4 * wavy
    over(deeper * inside(stomach), "muscle")
    over(deeper * inside(stomach - 5), "stomach", 1 + 0.7 * vary[8] + 0.25 * coarse)
    spleen = ellipsoid((92, 62 + 8 * vary[9], -62), (32, 40, 46)) + 4 * wavy
    over(deeper * inside(spleen), "spleen", 1 + 0.03 * fine)

    spine = middle + depth_ap - 22
    vertebra = ellipsoid((-36, spine, 0), (22, 19, np.inf))
    over(inside(vertebra), "lung")
    over(inside(vertebra - 2), "marrow", 1 + 0.1 * fine)
    over(inside(vertebra - 2) * np.clip(8 * np.sin(2 * np.pi * (up + 10 * vary[10]) / 30) - 5, 0, 1), "muscle")
    over(inside(ellipsoid((-36, spine + 28, 0), (9, 8, np.inf))), "blood", 1.1)  # cerebrospinal fluid
    for centre, radius in (((-6 + 4 * vary[11], spine - 22, 0), 11.0), ((-62, spine - 42, 0), 13.0)):
        vessel = ellipsoid(centre, (radius, radius, np.inf))
        over(inside(vessel + 1.5), "muscle")
        over(inside(vessel), "blood" if radius == 11.0 else "venous blood")
    return value


def _texture(patient: Patient, points_mm: Float, feature_mm: float, step: int) -> Float:
    """Periodic smooth noise of unit variance, features about `feature_mm` wide, read at every `step`-th pixel."""
    coordinates = np.moveaxis(points_mm[::step, ::step], -1, 0) * np.float32(2.0 / feature_mm)
    volume = _noise_volume(patient.texture_seed)
    return enlarge(
        map_coordinates(volume, coordinates, order=1, mode="grid-wrap", prefilter=False), points_mm.shape[:2], step
    )


@lru_cache(maxsize=1)
def _noise_volume(seed: int) -> Float:
    """A patient's noise; the same for all slices, and at three scales unlike enough to serve all of them."""
    noise = np.random.default_rng([seed, 2]).standard_normal((TEXTURE_SIZE,) * 3, dtype=np.float32)
    smooth = gaussian_filter(noise, 1.2, mode="wrap")
    return smooth / smooth.std()

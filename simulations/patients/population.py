"""Who comes to a hospital: pathology groups, populations, and patients drawn from them.

Group ranges follow the ACDC definitions (Bernard et al. 2018, https://doi.org/10.1109/TMI.2018.2837502) and textbook
values; lengths and volumes scale with body size. A patient is the anatomy alone: `heart.py` says how it moves,
`torso.py` what it looks like, `fedcmr.simulations.scanners` how it is scanned.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedcmr.simulations.patients.heart import Float, GroupName, Patient, with_volume

Range = tuple[float, float]


@dataclass(frozen=True)
class Group:
    """Ranges of a pathology group, uniform within.

    Attributes:
        ef: LV ejection fraction.
        edv_ml: LV end-diastolic volume of a body of mean size.
        length_mm: Mitral plane to endocardial apex at end-diastole.
        wall_mm: End-diastolic wall thickness away from any local thickening.
        rv_width_mm: Septum to RV free wall at the base, end-diastole.
        rv_shortening: Part of that width lost at end-systole.
    """

    ef: Range
    edv_ml: Range
    length_mm: Range
    wall_mm: Range
    rv_width_mm: Range
    rv_shortening: Range


GROUPS: dict[GroupName, Group] = {
    "normal": Group((0.53, 0.70), (105, 180), (76, 88), (6.5, 9.5), (30, 39), (0.36, 0.52)),
    "dilated": Group((0.10, 0.35), (220, 350), (86, 100), (5.5, 8.5), (30, 44), (0.15, 0.40)),
    "hypertrophic": Group((0.60, 0.80), (95, 160), (74, 86), (9.0, 13.0), (24, 32), (0.38, 0.55)),
    "infarcted": Group((0.20, 0.45), (140, 260), (80, 92), (7.0, 10.0), (29, 38), (0.30, 0.45)),
    "rv_dilated": Group((0.42, 0.65), (85, 150), (72, 84), (6.5, 9.5), (44, 57), (0.10, 0.28)),
}


@dataclass(frozen=True)
class Population:
    """Who comes to a hospital.

    Attributes:
        shares: Relative number of patients per pathology group.
        age_years: Mean and standard deviation.
        bmi: Mean and standard deviation of the body-mass index, kg / m^2.
        female_share: In [0, 1].
    """

    shares: Mapping[GroupName, float]
    age_years: Range = (58.0, 14.0)
    bmi: Range = (26.0, 4.0)
    female_share: float = 0.45


def draw_patient(rng: np.random.Generator, population: Population) -> Patient:
    """Draw a patient of a hospital's population."""
    names = list(population.shares)
    shares = np.array([population.shares[name] for name in names], float)
    name = names[rng.choice(len(names), p=shares / shares.sum())]
    group = GROUPS[name]
    female = rng.random() < population.female_share
    height_m = float(rng.normal(1.64 if female else 1.77, 0.065))
    bmi = float(np.clip(rng.normal(*population.bmi), 18, 42))
    # Volumes grow with body size and are smaller in women (about 15 % at equal size).
    size = float(np.clip(height_m / 1.71, 0.9, 1.12)) * (0.96 if female else 1.02)
    length_mm = rng.uniform(*group.length_mm) * size
    edv_ml = rng.uniform(*group.edv_ml) * size**2
    ef = float(rng.uniform(*group.ef))
    healthy_motion = min(ef / 0.6, 1.1)
    mapse_mm = float(np.clip(rng.normal(10, 1.2) * healthy_motion, 3, 13))
    hypertrophic = name == "hypertrophic"
    infarcted = name == "infarcted"
    thickening = (rng.uniform(5, 15), rng.normal(-2.7, 0.5), rng.uniform(0.7, 1.3)) if hypertrophic else (0.0, 0.0, 1.0)
    scar = (rng.uniform(0.75, 1.0), rng.uniform(-np.pi, np.pi), rng.uniform(0.6, 1.1), rng.uniform(0.45, 0.9))
    rv_loaded = name == "rv_dilated"
    heads = rng.normal([-0.75, -0.35, 1.25, 1.75], 0.12)  # two heads of each papillary muscle
    parameters = Patient(
        group=name,
        sex="F" if female else "M",
        age_years=int(np.clip(rng.normal(*population.age_years), 18, 88)),
        height_m=height_m,
        weight_kg=bmi * height_m**2,
        heart_rate_bpm=float(np.clip(rng.normal(80 if name == "dilated" else 68, 9), 45, 110)),
        ef=ef,
        radius_mm=1.0,
        length_mm=length_mm,
        wall_mm=rng.uniform(*group.wall_mm) * size,
        apical_wall_mm=rng.uniform(4.0, 7.0) * (1.6 if hypertrophic else 1.0),
        contraction=0.0,
        shape=np.stack([rng.normal(0, [0.04, 0.022, 0.012, 0.008]), rng.uniform(0, 2 * np.pi, 4)]).astype(np.float32),
        septal_flattening=rng.uniform(0.12, 0.3) if rv_loaded else rng.uniform(0.0, 0.06),
        thickening=thickening,
        scar=scar if infarcted else (0.0, 0.0, 1.0, 0.5),
        mapse_mm=mapse_mm,
        rv_width_mm=rng.uniform(*group.rv_width_mm) * size,
        rv_shortening=rng.uniform(*group.rv_shortening),
        rv_insertion=np.radians(rng.uniform(64, 78)) * (1.06 if rv_loaded else 1.0),
        rv_tilt=rng.normal(-0.1, 0.15),
        rv_base_mm=rng.uniform(0, 9),
        rv_shape=np.stack(
            [rng.normal([0, 0.06, 0], [0.03, 0.03, 0.02]), rng.normal([0, np.pi, 0], [2, 0.5, 2])]
        ).astype(np.float32),
        tapse_mm=float(np.clip(rng.normal(21, 2) * (0.55 if rv_loaded else healthy_motion), 6, 25)),
        papillary=np.stack([heads, rng.uniform(0.66, 0.84, 4), rng.uniform(2.6, 5.0, 4) * size], 1).astype(np.float32),
        trabeculae_mm=rng.uniform(5.0, 11.0),
        fat_mm=float(np.clip(rng.normal(2.5 + 0.25 * (bmi - 22), 1.2), 0.8, 9)),
        subcutaneous_mm=float(np.clip(rng.normal(8 + 0.9 * (bmi - 20) + (4 if female else 0), 3), 4, 45)),
        axis_bend_mm=(rng.normal(0, 3), rng.normal(0, 3)),
        es_time=rng.uniform(0.33, 0.39),
        rotation=_heart_axes(rng),
        texture_seed=int(rng.integers(2**31)),
    )
    return with_volume(parameters, edv_ml)


def _heart_axes(rng: np.random.Generator) -> Float:
    """Rows x, y, z of the heart in LPS: the apex points left, forward and down; drawn around a typical lie."""
    z = np.array([-0.66, 0.55, 0.51]) + rng.normal(0, 0.07, 3)
    y = np.array([-0.42, 0.07, -0.9]) + rng.normal(0, 0.07, 3)
    z /= np.linalg.norm(z)
    y -= (y @ z) * z
    y /= np.linalg.norm(y)
    return np.stack([np.cross(y, z), y, z])

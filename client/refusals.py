"""What each code means that a site may answer with, and what its own people can do about it."""

MEANINGS: dict[str, tuple[str, str]] = {
    "bad-request": (
        "the coordinator asked for something that this version does not know",
        "install the same version as the coordinator",
    ),
    "prior-mismatch": (
        "the study begins with another public prior",
        "install the prior that the coordinator names, 'prior:' in site.yaml",
    ),
    "settings-unreadable": ("site.yaml cannot be read", "'fedcmr-client check SITE' names the line"),
    "ledger-corrupt": (
        "the ledger's copies disagree or cannot be written, or the clock went back",
        "delete nothing; docs/deployment.md, 'Incidents', says what to do",
    ),
    "data-unreadable": (
        "the folder of cases is missing, or its index is damaged",
        "'fedcmr-client check SITE/train', then prepare again",
    ),
    "too-few-patients": (
        "fewer usable patients than policy.min_patients",
        "prepare more, draw what is missing, or stay out; 'fedcmr-client check SITE' counts",
    ),
    "noise-below-minimum": (
        "the study adds less noise than policy.min_noise_multiplier",
        "agree with the coordinator on the study's settings; do not lower the policy alone",
    ),
    "delta-above-cap": (
        "the study's delta is above policy.max_delta",
        "ask the coordinator to lower privacy.target_delta",
    ),
    "clip-above-cap": (
        "the study's clip is above policy.max_grad_norm",
        "ask the coordinator to lower privacy.max_grad_norm",
    ),
    "budget-exhausted": (
        "the release would pass policy.max_epsilon",
        "nothing, unless the hospital decides on a higher cap for these patients; 'fedcmr-client budget SITE' has all "
        "that was spent",
    ),
    "privacy-off-not-allowed": (
        "the study runs without privacy",
        "ask the coordinator to leave privacy.enabled on",
    ),
    "code-not-allowed": (
        "policy.allowed_code_sha256 does not list the code that came",
        "review that version and add what 'fedcmr-client code' prints for it, or ask for one that is listed",
    ),
    "rounds-exhausted": ("the study has more rounds than policy.max_rounds", "agree on fewer rounds, or on a new cap"),
    "facts-differ": (
        "the coordinator counts this site with other vendors or numbers than site.yaml",
        "correct whichever is wrong; the coordinator registers the site again",
    ),
    "sample-rate-below-minimum": (
        "the study would draw some of the patients where policy.min_sample_rate wants all",
        "ask the coordinator for privacy.sample_rate 1",
    ),
    "noise-above-cap": (
        "the study adds more noise than policy.max_noise_multiplier, for an answer that says nothing",
        "ask the coordinator for other settings",
    ),
    "steps-above-cap": (
        "a round has more steps than policy.max_local_steps",
        "ask the coordinator to lower federation.local_steps",
    ),
    "views-above-cap": (
        "a step takes more views of a patient than policy.max_views",
        "ask the coordinator to lower federation.num_views",
    ),
    "time-above-cap": (
        "on this machine the work would take longer than policy.max_seconds",
        "ask for fewer steps or views, use a faster machine, or allow more time",
    ),
    "no-evaluation": (
        "site.yaml names no test patients, or policy.evaluation is off",
        "nothing, unless this site wants studies to be evaluated on its test patients: 'test:' in site.yaml",
    ),
    "internal-error": (
        "something failed at this site; where the ledger was charged, this stays the answer of that round",
        "errors.log in the site's folder says what; the next round takes place as ever",
    ),
}
"""Code -> (meaning, remedy)."""


def in_words(code: str) -> str:
    """A code with its meaning and remedy, as one sentence; a code that is none as it is."""
    if code not in MEANINGS:
        return code
    meaning, remedy = MEANINGS[code]
    return f"{code}: {meaning}. Remedy: {remedy}"

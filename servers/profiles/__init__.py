"""Models, chips and fitted profiles as data files, and their loader."""

from fanmark.servers.profiles.parts import Chip, Grade, Model, ProfileError, grade_of
from fanmark.servers.profiles.priors import Efficiencies, Settings, kv_blocks, prior_law, prior_settings
from fanmark.servers.profiles.profile import (
    Profile,
    chip_ids,
    fitted_names,
    load_chip,
    load_model,
    load_profile,
    model_ids,
    prior_profile,
    profile_toml,
)

__all__ = [
    "Chip",
    "Efficiencies",
    "Grade",
    "Model",
    "Profile",
    "ProfileError",
    "Settings",
    "chip_ids",
    "fitted_names",
    "grade_of",
    "kv_blocks",
    "load_chip",
    "load_model",
    "load_profile",
    "model_ids",
    "prior_law",
    "prior_profile",
    "prior_settings",
    "profile_toml",
]

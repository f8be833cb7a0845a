"""Generators: families (build), checkpoints (resolve, describe, save) and safe loading."""

import logging

# Importing a diffusers pipeline makes transformers advise torchvision for image processors that nothing here uses.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

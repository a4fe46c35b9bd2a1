"""DeePMD-kit's plugin: entry point of the group `deepmd.pt`, loaded by every `dp --pt` command. It never raises.

It is outside the package so that dp runs even if the package cannot be imported. See docs/deepmd.md.
"""

import logging
import os

log = logging.getLogger("deepmd.rlekf_ext")

if os.environ.get("RLEKF_DEEPMD") != "0":
    try:
        from rlekf_ext.integrations.deepmd.patch import register

        register()
    except Exception as error:
        log.warning(
            "rlekf_ext: optimizer type RLEKF is not available, and dp runs as if rlekf_ext were not installed (%r).",
            error,
        )

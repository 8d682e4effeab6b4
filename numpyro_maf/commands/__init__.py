# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What the command line does, a module a command. Each has ``run(**options)``, which prints."""

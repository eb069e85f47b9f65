"""Predicting and measuring: plans for absent TPUs, static costs of kernels. For doors only."""

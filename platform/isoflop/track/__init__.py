"""Tracking: shows the ledger's rows in MLflow. The one room that knows MLflow; it knows neither Ray nor Optuna."""

from isoflop.track.tracker import Artifact, MlflowTracker, NullTracker, Tracker

__all__ = ["Artifact", "MlflowTracker", "NullTracker", "Tracker"]

"""Trackers beside metrics.jsonl: TensorBoard, wandb, MLflow. Each runs apart and cannot stop a run."""

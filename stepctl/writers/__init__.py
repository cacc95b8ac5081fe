"""Writers of metrics rows: metrics.jsonl, metrics.csv, TensorBoard, the console."""

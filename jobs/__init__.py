"""The outside world: the command line, clusters and trackers. The only package that imports Ray or MLflow."""

"""What MLflow remembers: records, versions, promotion, the index."""

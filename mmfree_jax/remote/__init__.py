"""Runs in a bucket, at a URL such as s3://BUCKET/RUN."""

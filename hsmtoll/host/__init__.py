"""The signing host: named callers, a policy for each, an audit log, and grants instead of bytes."""

"""hsmtoll"""

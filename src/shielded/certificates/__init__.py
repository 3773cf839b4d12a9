"""Certificates of finished images, the audit log of a run, and the check of both."""

from shielded.certificates.audit import AuditLog, read_log
from shielded.certificates.certificate import Certificate, file_sha256
from shielded.certificates.verification import Verified, verify_images

__all__ = ["AuditLog", "Certificate", "Verified", "file_sha256", "read_log", "verify_images"]

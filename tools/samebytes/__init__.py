"""Proof that a change of the code changes no output byte: many outputs, made by two trees and compared."""

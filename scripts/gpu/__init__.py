"""The GPU check in sections: what is measured, one module a section; how it is run and recorded, the others."""

/* The Python face: addresses and sizes in, the GIL released while the kernels run. No torch headers, so
 * one build serves every version of torch. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "superblock.h"

#ifndef SB_SOURCE_HASH
#define SB_SOURCE_HASH "unknown"
#endif

static int parse(PyObject *const *args, Py_ssize_t n, Py_ssize_t expected, int64_t *out) {
    if (n != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", expected, n);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        out[i] = PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

static void *pointer(int64_t address) { return (void *)(uintptr_t)address; }

static int64_t n_blocks(int64_t features, int64_t size) { return size < 1 ? 0 : (features + size - 1) / size; }

static PyObject *result(int status, int64_t n_block_cols, int64_t nnz) {
    switch (status) {
    case SB_OK:
        Py_RETURN_NONE;
    case SB_BAD_CROW:
        return PyErr_Format(PyExc_ValueError,
                            "crow_indices must start at 0, never decrease and end at nnz = %lld; check the index with "
                            "torchao_superblock.bsr.format.check_bsr",
                            (long long)nnz);
    case SB_BAD_COL:
        return PyErr_Format(PyExc_ValueError,
                            "col_indices must lie in [0, %lld), the number of block columns; check the index with "
                            "torchao_superblock.bsr.format.check_bsr",
                            (long long)n_block_cols);
    default:
        return PyErr_NoMemory();
    }
}

static PyObject *product(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    (void)self;
    int64_t a[18];
    if (parse(args, n, 18, a)) return NULL;
    const sb_product p = {
        .x = pointer(a[0]), .x_row = a[1], .x_col = a[2], .crow = pointer(a[3]), .col = pointer(a[4]),
        .transposed = a[5] != 0, .values = pointer(a[6]), .bias = pointer(a[7]), .y = pointer(a[8]), .M = a[9],
        .N = a[10], .K = a[11], .R = n_blocks(a[10], a[12]), .C = n_blocks(a[11], a[13]), .r = a[12], .c = a[13],
        .nnz = a[14], .dtype = (int)a[15], .activation = (int)a[16], .threads = (int)a[17],
    };
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = sb_run_product(&p);
    Py_END_ALLOW_THREADS
    return result(status, p.transposed ? p.R : p.C, p.nnz);
}

static PyObject *grad_values(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    (void)self;
    int64_t a[17];
    if (parse(args, n, 17, a)) return NULL;
    const sb_grad_values p = {
        .grad = pointer(a[0]), .grad_row = a[1], .grad_col = a[2], .x = pointer(a[3]), .x_row = a[4],
        .x_col = a[5], .crow = pointer(a[6]), .col = pointer(a[7]), .out = pointer(a[8]), .M = a[9], .N = a[10],
        .K = a[11], .R = n_blocks(a[10], a[12]), .C = n_blocks(a[11], a[13]), .r = a[12], .c = a[13], .nnz = a[14],
        .dtype = (int)a[15], .threads = (int)a[16],
    };
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = sb_run_grad_values(&p);
    Py_END_ALLOW_THREADS
    return result(status, p.C, p.nnz);
}

static PyObject *isa(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(sb_isa_name(sb_isa_current()));
}

static PyObject *supported_isas(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < SB_N_ISA; i++) {
        if (!sb_isa_supported(i)) continue;
        PyObject *name = PyUnicode_FromString(sb_isa_name(i));
        if (!name || PyList_Append(list, name)) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *select_isa(PyObject *self, PyObject *name) {
    (void)self;
    for (int i = 0; i < SB_N_ISA; i++) {
        const int same = PyUnicode_CompareWithASCIIString(name, sb_isa_name(i)) == 0;
        if (same && sb_isa_select(i) == 0) Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "%R is not an instruction set that this processor has", name);
}

static PyObject *threading(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(sb_threading());
}

static PyObject *run_on_one_thread(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    sb_run_on_one_thread();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL,
     "product(x, x_row, x_col, crow, col, transposed, values, bias, y, M, N, K, r, c, nnz, dtype, activation, threads)"},
    {"grad_values", (PyCFunction)(void (*)(void))grad_values, METH_FASTCALL,
     "grad_values(grad, grad_row, grad_col, x, x_row, x_col, crow, col, out, M, N, K, r, c, nnz, dtype, threads)"},
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"supported_isas", supported_isas, METH_NOARGS, "Instruction sets this processor has, weakest first."},
    {"select_isa", select_isa, METH_O, "Use an instruction set by name."},
    {"threading", threading, METH_NOARGS, "Where the threads come from."},
    {"run_on_one_thread", run_on_one_thread, METH_NOARGS, "Start no threads any more: this process is a forked child."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_cpu", .m_doc = "Block-sparse linear kernels.", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__cpu(void) {
    sb_watch_forks();
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddStringConstant(module, "source_hash", SB_SOURCE_HASH)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}

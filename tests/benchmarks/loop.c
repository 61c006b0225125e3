/* What the device can do at best: C_SignInit + C_Sign in a loop, nothing between.
 *
 *   loop MODULE TOKEN_LABEL KEY_LABEL SECONDS LENGTH [CERTIFICATE_LABEL ...]
 *
 * The PIN comes on stdin; after it is ready, a second line lets it begin. Certificates are read
 * before that. In no seconds there is one signature: the calls of a first token.
 *
 * Prints signatures per second. Declarations are those of PKCS#11 v2.40 that are used here.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned long ulong_t;
typedef struct { unsigned char major, minor; } version_t;
typedef struct { ulong_t type; void *value; ulong_t length; } attribute_t;
typedef struct { ulong_t mechanism; void *parameter; ulong_t length; } mechanism_t;
typedef struct {
    unsigned char label[32], manufacturer[32], model[16], serial[16];
    ulong_t flags, numbers[10];
    version_t hardware, firmware;
    unsigned char time[16];
} token_info_t;

/* The function list: a version, then 68 pointers in the standard's order. */
typedef struct { version_t version; void *function[68]; } list_t;
enum { INITIALIZE = 0, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, OPEN_SESSION = 12, LOGIN = 18,
       GET_ATTRIBUTE = 24, FIND_INIT = 26, FIND = 27, FIND_FINAL = 28, SIGN_INIT = 42, SIGN = 43 };

#define CALL(name, ...) do { \
    ulong_t rv = ((ulong_t (*)()) list->function[name])(__VA_ARGS__); \
    if (rv) { fprintf(stderr, #name ": 0x%lx\n", rv); exit(1); } \
} while (0)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static ulong_t find(list_t *list, ulong_t session, ulong_t class, char *label) {
    attribute_t wanted[] = {{0, &class, sizeof class}, {3, label, strlen(label)}};
    ulong_t object, found;
    CALL(FIND_INIT, session, wanted, (ulong_t) 2);
    CALL(FIND, session, &object, (ulong_t) 1, &found);
    CALL(FIND_FINAL, session);
    if (!found) { fprintf(stderr, "no such object: %s\n", label); exit(1); }
    return object;
}

int main(int argc, char **argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: loop MODULE TOKEN_LABEL KEY_LABEL SECONDS LENGTH [CERTIFICATE_LABEL ...]\n");
        return 2;
    }
    char pin[256];
    if (!fgets(pin, sizeof pin, stdin)) return 2;
    pin[strcspn(pin, "\n")] = 0;

    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library) { fprintf(stderr, "%s\n", dlerror()); return 1; }
    list_t *list;
    ulong_t (*get)(list_t **) = (ulong_t (*)(list_t **)) dlsym(library, "C_GetFunctionList");
    if (!get || get(&list)) return 1;
    CALL(INITIALIZE, NULL);

    ulong_t slots[64], count = 64, slot = (ulong_t) -1;
    CALL(GET_SLOT_LIST, (unsigned char) 1, slots, &count);
    for (ulong_t i = 0; i < count; i++) {
        token_info_t info;
        CALL(GET_TOKEN_INFO, slots[i], &info);
        if (!strncmp((char *) info.label, argv[2], strlen(argv[2]))) slot = slots[i];
    }
    if (slot == (ulong_t) -1) { fprintf(stderr, "no such token\n"); return 1; }

    ulong_t session, key;
    CALL(OPEN_SESSION, slot, (ulong_t) 4, NULL, NULL, &session);
    CALL(LOGIN, session, (ulong_t) 1, pin, (ulong_t) strlen(pin));
    key = find(list, session, 3, argv[3]);
    for (int i = 6; i < argc; i++) {
        static unsigned char der[8192];
        attribute_t value = {0x11, der, sizeof der};
        CALL(GET_ATTRIBUTE, session, find(list, session, 1, argv[i]), &value, (ulong_t) 1);
    }
    /* Who logs in at the same time as others may fail; who signs does not. */
    char go[8];
    puts("ready");
    fflush(stdout);
    if (!fgets(go, sizeof go, stdin)) return 2;

    /* As long as the signing input that it is compared with. */
    static unsigned char signature[1024];
    ulong_t size = strtoul(argv[5], NULL, 10);
    unsigned char *data = malloc(size);
    if (!data) return 1;
    memset(data, 'a', size);
    mechanism_t sha256_rsa = {0x40, NULL, 0};
    double seconds = atof(argv[4]), began = now(), until = began + seconds;
    long signatures = seconds > 0 ? -20 : 0;
    do {
        ulong_t length = sizeof signature;
        CALL(SIGN_INIT, session, &sha256_rsa, key);
        CALL(SIGN, session, data, size, signature, &length);
        if (++signatures == 0) { began = now(); until = began + seconds; }
    } while (signatures < 0 || now() < until);
    printf("%.2f\n", signatures / (now() - began));
    return 0;
}

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// expansionRetry is how often the informer shows every claim again, and so how soon a failed expansion is tried again.
const expansionRetry = 5 * time.Second

// watchExpansions grows the volume of every claim that asks for more than it has. The API server has checked by then that its
// storage class allows it.
func (p volumes) watchExpansions(ctx context.Context, claims cache.SharedIndexInformer) error {
	look := func(object any) {
		claim := object.(*v1.PersistentVolumeClaim)
		wanted, has := claim.Spec.Resources.Requests[v1.ResourceStorage], claim.Status.Capacity[v1.ResourceStorage]
		if claim.Status.Phase != v1.ClaimBound || wanted.Cmp(has) <= 0 {
			return
		}
		if err := p.expand(ctx, claim, wanted); err != nil {
			klog.ErrorS(err, "Expansion failed", "claim", klog.KObj(claim), "size", wanted.String())
		}
	}
	_, err := claims.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    look,
		UpdateFunc: func(_, object any) { look(object) },
	})
	return err
}

// expand can be repeated from the start whatever step failed.
func (p volumes) expand(ctx context.Context, claim *v1.PersistentVolumeClaim, size resource.Quantity) error {
	name := claim.Spec.VolumeName
	volume, err := p.client.CoreV1().PersistentVolumes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if volume.Annotations["pv.kubernetes.io/provisioned-by"] != provisionerName {
		return nil
	}
	if err := p.grow(ctx, name, size.Value()); err != nil {
		return err
	}
	capacity := map[string]any{"capacity": v1.ResourceList{v1.ResourceStorage: size}}
	patch, err := json.Marshal(map[string]any{"spec": capacity})
	if err != nil {
		return err
	}
	if _, err := p.client.CoreV1().PersistentVolumes().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return err
	}
	if patch, err = json.Marshal(map[string]any{"status": capacity}); err != nil {
		return err
	}
	_, err = p.client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(
		ctx, claim.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// grow makes the image, the loop device and the mounted file system larger, in this order; none of them ever shrinks.
func (p volumes) grow(ctx context.Context, name string, bytes int64) error {
	image := p.image(name)
	info, err := os.Stat(image)
	if err != nil {
		return err
	}
	if info.Size() < bytes {
		if err := os.Truncate(image, bytes); err != nil {
			return err
		}
	}
	device, err := run(ctx, "findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", p.mountPoint(name))
	if err != nil {
		return fmt.Errorf("volume %s is not mounted: %w", name, err)
	}
	if _, err := run(ctx, "losetup", "--set-capacity", device); err != nil {
		return err
	}
	_, err = run(ctx, "xfs_growfs", p.mountPoint(name))
	return err
}
